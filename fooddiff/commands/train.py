"""Trains a config in a workdir, or goes on with it."""

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from fooddiff import build, keys, parallel, processes
from fooddiff.arrays import Batch, Key, Params
from fooddiff.commands import autoencoder_actions, classifier_actions, diffusion_actions, signals
from fooddiff.commands.actions import Surroundings
from fooddiff.commands.latents import feed_of
from fooddiff.data.feed import device_batches
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.codec_file import check_codec, read_codec, sha256_of_codec, split_codec, write_codec
from fooddiff.runs.fine_tune import starting_weights
from fooddiff.runs.load import described, load_trained
from fooddiff.runs.perceptual import features_of
from fooddiff.runs.record import NoRecorder, Recorder
from fooddiff.settings import ConfigError
from fooddiff.train.loop import train
from fooddiff.train.state import TrainState
from fooddiff.xla import jit

log = logging.getLogger(__name__)

ACTIONS = {  # of every task of `build.TASKS`
    "diffusion": diffusion_actions.make_actions,
    "autoencoder": autoencoder_actions.make_actions,
    "classifier": classifier_actions.make_actions,
}


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains to config.train.steps; resumes from the newest checkpoint if the workdir has one.

    A new run starts at random, or from the weights that config.init_from names.

    Raises:
        ConfigError: a config value that cannot be.
        workdirs.WorkdirError: the workdir belongs to another config or to other data, or config.init_from does not fit.
        FileNotFoundError: config.init_from holds no checkpoint.
        signals.Stopped: SIGTERM or SIGINT ended the run early; its state is saved.
    """
    mesh = parallel.make_mesh()
    training = build.make_training(config, mesh)
    actions = ACTIONS[build.task_of(config)](config, training.model, mesh)
    processes.on_first(lambda: workdirs.check(workdir, config))
    log.info("workdir %s, devices %d x %s", workdir.resolve(), mesh.size, jax.devices()[0].device_kind)

    resuming = bool(workdirs.checkpoint_steps(workdir))
    source = None if resuming or config.init_from is None else Path(config.init_from)
    if source is not None and not source.is_file() and not workdirs.checkpoint_steps(source):
        raise FileNotFoundError(f"config.init_from is {str(source)!r}: expected a run with a checkpoint, or a file")
    dataset = build.make_dataset(config, "train")
    actions.check_data(dataset)
    processes.check_same("the training data (their SHA-256)", dataset.manifest["sha256"])
    key = keys.root(config.seed, training.replicated)
    state, origin, begun = None, None, None
    if resuming:
        begun = read_codec(workdir, build.codec_tensors(config))
    else:
        state, origin, begun = _first_state(config, training, mesh, dataset.class_names, key)
    feed = feed_of(config, dataset, mesh, begun=begun)
    log.info("%d training images of %d classes", len(dataset.labels), len(dataset.class_names))

    meta = {
        "config": workdirs.to_json(config),
        "class_names": list(dataset.class_names),
        "data_sha256": dataset.manifest["sha256"],
        "versions": workdirs.versions(),
        "origin": origin,
        "codec_sha256": sha256_of_codec(feed.codec),
        "codec_origin": feed.codec_origin or (origin or {}).get("codec_origin"),
    }

    with ExitStack() as stack:
        # not before all of that is there: a start that failed leaves the directory free
        processes.on_first(lambda: stack.enter_context(workdirs.claimed(workdir, config)))
        if bool(workdirs.checkpoint_steps(workdir)) != resuming:
            raise workdirs.WorkdirError(
                f"the checkpoints in {workdir} have come or gone since this start: give the same command again"
            )
        if not resuming:
            processes.on_first(lambda: workdirs.write_identity(workdir, config))
            processes.on_first(lambda: write_codec(workdir, feed.codec))
        checkpoints = stack.enter_context(
            Checkpoints(workdir, keep_newest=config.train.keep_checkpoints, keep_best=config.train.keep_best)
        )
        if resuming:
            state = checkpoints.restore_newest(
                training.abstract_state, accept=lambda saved: _check_same_run(saved, meta, feed.codec, workdir)
            )
            saved = checkpoints.meta(int(state.step))
            meta |= {name: saved.get(name) for name in ("origin", "codec_origin")}
            processes.on_first(lambda: workdirs.write_identity(workdir, config))
            log.info("resumed at step %d of %d", int(state.step), config.train.steps)
        _check_room(workdir, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        log.info("%s parameters, training to step %d", f"{parameters:,}", config.train.steps)

        batches = device_batches(
            feed.examples, seed=config.seed, batch_size=config.train.batch_size, start_step=int(state.step),
            flip=config.data.flip, sharding=training.over_data,
        )  # fmt: skip
        start = int(state.step)
        with (
            Recorder(workdir, resume_step=start, wandb_project=config.log.wandb_project, config=meta["config"])
            if processes.is_first()
            else NoRecorder() as recorder,
            signals.graceful_stop() as stop_signal,
        ):
            codec = jax.device_put(feed.codec, training.replicated)
            periodic = actions.periodic(
                Surroundings(dataset, feed.examples, codec, workdir, recorder, stop_signal, checkpoints.add_score)
            )
            state = train(
                state,
                jit(training.step, donate_argnums=0, out_shardings=training.state_sharding),
                batches,
                key,
                steps=config.train.steps,
                log_every=config.log.every_steps,
                checkpoint_every=config.train.checkpoint_every,
                max_skipped=config.train.max_skipped,
                record=partial(_record, recorder, checkpoints),
                diagnose=partial(_diagnose, jit(training.diagnose, out_shardings=training.replicated), key),
                periodic=periodic,
                save=lambda state: checkpoints.save(state, meta),
                should_stop=lambda: stop_signal(wait=False) > 0,
                show_progress=processes.is_first(),
            )
            checkpoints.wait()  # here, where a signal still finds who waits for what is being written
    if number := stop_signal(wait=True):
        log.info("stopped at step %d, which is saved; the same command goes on", int(state.step))
        raise signals.Stopped(number)
    log.info("done. Next: %s", actions.next_command.format(workdir))


def _check_room(workdir: Path, needed: int) -> None:
    """Raises OSError if the disk has no room for one checkpoint, which is known now and would be missed hours later."""
    if (free := shutil.disk_usage(workdir).free) < needed:
        raise OSError(
            f"a checkpoint takes {needed / 1e9:.2f} GB, the disk of {workdir} has {free / 1e9:.2f} GB left: make room, "
            f"or give another --workdir"
        )


def _first_state(
    config: ConfigDict, training: build.Training, mesh: jax.sharding.Mesh, class_names: tuple[str, ...], key: Key
) -> tuple[TrainState, Mapping[str, Any] | None, Params | None]:
    """The state before the first step of a new run, and where its weights come from (None: they are random).

    Weights of another run bring the codec whose latents they know.
    """
    carried = features_of(config, mesh)
    if config.init_from is None:
        return build.first_state(training, key, {}, carried), None, None
    if "codec" in config and config.codec.get("path") is not None:
        raise ConfigError("config.init_from brings the codec of its latents: leave out config.codec.path")
    source = load_trained(Path(config.init_from), step=None, weights="ema", mesh=mesh, task=build.task_of(config))
    weights, origin = starting_weights(source, config, class_names, training.abstract_state.params)
    _, codec = split_codec(source.params, build.codec_tensors(config))
    return build.first_state(training, key, weights, carried), {"workdir": config.init_from, **origin}, codec


def _record(recorder: Recorder | NoRecorder, checkpoints: Checkpoints, step: int, values: Mapping[str, float]) -> None:
    checkpoints.check()  # a save that failed in the background ends the run here at the latest
    recorder.scalars(step, values)


def _diagnose(diagnosis: Callable[..., Mapping[str, Any]], key: Key, state: TrainState, batch: Batch) -> str:
    """Names the first thing that is not finite in the step that led to a state."""
    found = jax.device_get(diagnosis(state, batch, key))
    finite = {f"parameter {name}": value for name, value in found["parameters"].items()}
    finite |= {f"the loss of example {i}": value for i, value in enumerate(found["losses"])}
    finite |= {f"the gradient of {name}": value for name, value in found["gradients"].items()}
    if bad := [name for name, value in finite.items() if not value]:
        return f"the first bad tensor is {bad[0]}, one of {len(bad)}"
    return "each gradient is finite, but their norm, the updated parameters or what the task carries are not"


def _check_same_run(saved: Mapping[str, Any], meta: Mapping[str, Any], codec: Params, workdir: Path) -> None:
    """Refuses a checkpoint of another run.

    Its data must be the same, too; imported weights may be trained on any with their classes.
    """
    described(saved, workdir / "checkpoints")
    if changed := workdirs.differences(saved["config"], meta["config"]):
        raise workdirs.WorkdirError(f"the checkpoint in {workdir} is of another run: {', '.join(changed)} differ")
    check_codec(saved.get("codec_sha256"), codec, workdir)
    if saved["data_sha256"] is None:
        conditional = meta["config"]["model"].get("num_classes") is not None
        if conditional and saved["class_names"] != meta["class_names"]:
            raise workdirs.WorkdirError(
                f"the imported weights in {workdir} know {_some(saved['class_names'])}, the data have "
                f"{_some(meta['class_names'])}. If these are the same classes, import again and name them with "
                f"--class_names; if not, give another --workdir and --config.init_from={workdir}"
            )
        log.info("%s holds imported weights, which belong to no data: any are accepted", workdir)
        return
    for name in ("data_sha256", "class_names"):
        if saved[name] != meta[name]:
            raise workdirs.WorkdirError(
                f"{workdir} was trained on other data: {name} is {saved[name]} in its checkpoint and {meta[name]} now"
            )


def _some(names: list[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
