"""Trains a config in a workdir, or goes on with it."""

import logging
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from fooddiff import build
from fooddiff.commands import workdir as workdirs
from fooddiff.data.feed import device_batches
from fooddiff.sample.generate import Generator, generate_batches, sample_ids
from fooddiff.sample.grid import class_grid, png_bytes
from fooddiff.train.checkpoint import Checkpoints
from fooddiff.train.loop import Snapshot, train
from fooddiff.train.record import Recorder, write_atomically
from fooddiff.train.state import TrainState
from fooddiff.xla import jit

log = logging.getLogger(__name__)

GRID_SEED = 0  # the grids of all runs start from the same noise, so that they can be compared


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains to config.train.steps; resumes from the newest checkpoint if the workdir has one.

    Raises:
        build.ConfigError: a config value that cannot be.
        workdirs.WorkdirError: the workdir belongs to another config.
    """
    mesh = build.make_mesh()
    training = build.make_training(config, mesh)
    generator = _grid_generator(config, training.model, mesh)
    workdirs.check(workdir, config)
    log.info("workdir %s, devices %d x %s", workdir.resolve(), mesh.size, jax.devices()[0].device_kind)

    dataset = build.make_dataset(config, "train")
    workdirs.claim(workdir, config)  # not before the data are there: a start that failed leaves the directory free
    log.info("%d training images of %d classes", len(dataset.labels), len(dataset.class_names))

    key = jax.device_put(jax.random.key(config.seed), training.replicated)
    meta = {
        "config": workdirs.to_json(config),
        "class_names": list(dataset.class_names),
        "data_sha256": dataset.manifest["sha256"],
        "versions": workdirs.versions(),
    }

    with Checkpoints(workdir, max_to_keep=config.train.keep_checkpoints) as checkpoints:
        if steps := checkpoints.steps():
            _check_data(checkpoints.meta(steps[-1]), meta, workdir)
            state = checkpoints.restore(steps[-1], training.abstract_state)
            log.info("resumed at step %d of %d", steps[-1], config.train.steps)
        else:
            state = jit(training.init, out_shardings=training.replicated)(key)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        log.info("%s parameters, training to step %d", f"{parameters:,}", config.train.steps)

        batches = device_batches(
            dataset, seed=config.seed, batch_size=config.train.batch_size, start_step=int(state.step),
            flip=config.data.flip, sharding=training.over_data,
        )  # fmt: skip
        with Recorder(
            workdir, resume_step=int(state.step), wandb_project=config.log.wandb_project, config=meta["config"]
        ) as recorder:
            draw_grids = partial(_draw_grids, config, generator, dataset.class_names, workdir, recorder)
            train(
                state,
                jit(training.step, donate_argnums=0, out_shardings=training.replicated),
                batches,
                key,
                steps=config.train.steps,
                log_every=config.log.every_steps,
                checkpoint_every=config.train.checkpoint_every,
                max_skipped=config.train.max_skipped,
                record=recorder.scalars,
                snapshots=[Snapshot(config.sample.every_steps, draw_grids)],
                save=partial(checkpoints.save, meta=meta),
            )
        checkpoints.wait()
    log.info("done. Next: python run_sample.py --workdir=%s", workdir)


def _check_data(saved: dict, meta: dict, workdir: Path) -> None:
    for name in ("data_sha256", "class_names"):
        if saved[name] != meta[name]:
            raise workdirs.WorkdirError(
                f"{workdir} was trained on other data: {name} is {saved[name]} in its checkpoint and {meta[name]} now"
            )


def _grid_generator(config: ConfigDict, model: build.DiffusionModel, mesh: jax.sharding.Mesh) -> Generator:
    sample = config.sample
    for field in ("every_steps", "per_class", "batch_size"):
        build.check_positive(f"sample.{field}", sample[field])
    build.check_positive("log.every_steps", config.log.every_steps)
    if sample.batch_size % mesh.size:
        raise build.ConfigError(
            f"config.sample.batch_size {sample.batch_size} cannot be divided among {mesh.size} devices"
        )
    return build.make_sampler(model, mesh, sampler=sample.sampler, steps=sample.steps, eta=sample.eta)


def _draw_grids(
    config: ConfigDict,
    generator: Generator,
    class_names: tuple[str, ...],
    workdir: Path,
    recorder: Recorder,
    step: int,
    state: TrainState,
) -> None:
    """Writes samples/step_<step>_<weights>.png for the raw weights and the first average."""
    names = tuple(config.sample.classes) or class_names[:12]
    ids = sample_ids(workdirs.class_ids(class_names, names), config.sample.per_class)
    key = jax.random.key(GRID_SEED)
    weights = {"raw": state.params} | {f"ema_{rate}": state.ema[str(rate)] for rate in config.ema.rates[:1]}
    (workdir / "samples").mkdir(exist_ok=True)
    for name, params in weights.items():
        images = np.concatenate(list(generate_batches(generator, params, key, ids, config.sample.batch_size)))
        grid = class_grid(images.reshape(len(names), config.sample.per_class, *images.shape[1:]), names)
        path = workdir / "samples" / f"step_{step:07d}_{name}.png"
        write_atomically(path, png_bytes(grid))
        recorder.picture(step, f"samples/{name}", path)
