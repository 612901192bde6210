"""Trains a config in a workdir, or goes on with it."""

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fooddiff import build, keys, parallel, processes
from fooddiff.arrays import Batch, Key
from fooddiff.commands import scorer, signals
from fooddiff.data.cache import Dataset
from fooddiff.data.feed import device_batches
from fooddiff.files.atomic import write_atomically
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.checkpoint import Checkpoints, SaveError
from fooddiff.runs.fine_tune import starting_weights
from fooddiff.runs.load import class_ids, described, load_trained, stored_weights
from fooddiff.runs.record import NoRecorder, Recorder
from fooddiff.sample.colour import colour_spread, is_suspicious
from fooddiff.sample.generate import Draw, draw_batches, sample_ids
from fooddiff.sample.grid import Grid, class_grid, is_grid, png_bytes, read_grid
from fooddiff.sample.one_step import OneStep
from fooddiff.settings import ConfigError, check_positive
from fooddiff.train.loop import Periodic, train
from fooddiff.train.state import TrainState
from fooddiff.xla import jit

log = logging.getLogger(__name__)

MAX_REAL_IMAGES = 2000  # whose colours samples are compared with
ONE_STEP_IMAGES = 3
GRID_SEED = 0  # the grids of all runs start from the same noise, so that they can be compared


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
    draw, plain_draw = _grid_draws(config, training.model, mesh)
    one_step = build.make_one_step(training.model, mesh)
    processes.on_first(lambda: workdirs.check(workdir, config))
    log.info("workdir %s, devices %d x %s", workdir.resolve(), mesh.size, jax.devices()[0].device_kind)

    resuming = bool(workdirs.checkpoint_steps(workdir))
    if not resuming and config.init_from is not None and not workdirs.checkpoint_steps(Path(config.init_from)):
        raise FileNotFoundError(f"config.init_from is {config.init_from!r}, a directory without a checkpoint of a run")
    dataset = build.make_dataset(config, "train")
    class_ids(dataset.class_names, tuple(config.sample.classes))  # raises now what the first grid would raise
    processes.check_same("the training data (their SHA-256)", dataset.manifest["sha256"])
    key = keys.root(config.seed, training.replicated)
    state, origin = (None, None) if resuming else _first_state(config, training, mesh, dataset.class_names, key)
    log.info("%d training images of %d classes", len(dataset.labels), len(dataset.class_names))

    meta = {
        "config": workdirs.to_json(config),
        "class_names": list(dataset.class_names),
        "data_sha256": dataset.manifest["sha256"],
        "versions": workdirs.versions(),
        "origin": origin,
    }

    with ExitStack() as stack:
        # not before all of that is there: a start that failed leaves the directory free
        processes.on_first(lambda: stack.enter_context(workdirs.claimed(workdir, config)))
        checkpoints = stack.enter_context(
            Checkpoints(workdir, keep_newest=config.train.keep_checkpoints, keep_best=config.train.keep_best)
        )
        if resuming:
            state = checkpoints.restore_newest(
                training.abstract_state, accept=lambda saved: _check_same_run(saved, meta, workdir)
            )
            meta["origin"] = checkpoints.meta(int(state.step)).get("origin")
            log.info("resumed at step %d of %d", int(state.step), config.train.steps)
        _check_room(workdir, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        log.info("%s parameters, training to step %d", f"{parameters:,}", config.train.steps)

        batches = device_batches(
            dataset, seed=config.seed, batch_size=config.train.batch_size, start_step=int(state.step),
            flip=config.data.flip, sharding=training.over_data,
        )  # fmt: skip
        start = int(state.step)
        with (
            Recorder(workdir, resume_step=start, wandb_project=config.log.wandb_project, config=meta["config"])
            if processes.is_first()
            else NoRecorder() as recorder,
            signals.graceful_stop() as stop_signal,
        ):
            evaluations = _evaluations(
                config, draw, dataset.class_names, workdir, recorder, stop_signal, checkpoints.add_score
            )
            draw_grids = partial(_draw_grids, config, draw, plain_draw, dataset, workdir, recorder)
            draw_steps = partial(_draw_one_steps, config, *one_step, dataset, workdir, recorder)
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
                periodic=[
                    Periodic(config.sample.every_steps, draw_grids),
                    Periodic(config.sample.every_steps, draw_steps),
                    *evaluations,
                ],
                save=lambda state: checkpoints.save(state, meta),
                should_stop=lambda: stop_signal(wait=False) > 0,
                show_progress=processes.is_first(),
            )
        checkpoints.wait()
    if number := stop_signal(wait=True):
        log.info("stopped at step %d, which is saved; the same command goes on", int(state.step))
        raise signals.Stopped(number)
    log.info("done. Next: python run_sample.py --workdir=%s", workdir)


def _check_room(workdir: Path, needed: int) -> None:
    """Raises OSError if the disk has no room for one checkpoint, which is known now and would be missed hours later."""
    if (free := shutil.disk_usage(workdir).free) < needed:
        raise OSError(
            f"a checkpoint takes {needed / 1e9:.2f} GB, the disk of {workdir} has {free / 1e9:.2f} GB left: make room, "
            f"or give another --workdir"
        )


def _first_state(
    config: ConfigDict, training: build.Training, mesh: jax.sharding.Mesh, class_names: tuple[str, ...], key: Key
) -> tuple[TrainState, Mapping[str, Any] | None]:
    """The state before the first step of a new run, and where its weights come from (None: they are random)."""
    if config.init_from is None:
        return build.first_state(training, key, {}), None
    source = load_trained(Path(config.init_from), step=None, weights="ema", mesh=mesh)
    weights, origin = starting_weights(source, config, class_names, training.abstract_state.params)
    return build.first_state(training, key, weights), {"workdir": config.init_from, **origin}


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
    return "each gradient is finite, but their norm or the updated parameters are not"


def _check_same_run(saved: Mapping[str, Any], meta: Mapping[str, Any], workdir: Path) -> None:
    """Refuses a checkpoint of another run.

    Its data must be the same, too; imported weights may be trained on any with their classes.
    """
    described(saved, workdir / "checkpoints")
    if changed := workdirs.differences(saved["config"], meta["config"]):
        raise workdirs.WorkdirError(f"the checkpoint in {workdir} is of another run: {', '.join(changed)} differ")
    if saved["data_sha256"] is None:
        conditional = meta["config"]["model"]["num_classes"] is not None
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


def _grid_draws(config: ConfigDict, model: build.DiffusionModel, mesh: jax.sharding.Mesh) -> tuple[Draw, Draw | None]:
    """The compiled sampler of config.sample and, if that guides, the same without guidance."""
    sample = config.sample
    for field in ("every_steps", "per_class", "batch_size"):
        check_positive(f"sample.{field}", sample[field])
    check_positive("log.every_steps", config.log.every_steps)
    check_positive("eval.every_steps", config.eval.every_steps)
    if sample.batch_size % mesh.size:
        raise ConfigError(f"config.sample.batch_size {sample.batch_size} cannot be divided among {mesh.size} devices")
    spec = build.sampler_spec(sample)
    plain = None if spec.guidance == 1 else build.sampler_spec(sample, guidance=1.0)
    return build.make_sampler(model, mesh, spec), plain and build.make_sampler(model, mesh, plain)


def _evaluations(
    config: ConfigDict,
    draw: Draw,
    class_names: tuple[str, ...],
    workdir: Path,
    recorder: Recorder | NoRecorder,
    stop_signal: signals.StopSignal,
    add_score: Callable[[int, float], None],
) -> list[Periodic]:
    """The evaluation during training that config.eval asks for, if any; a step's first number is its score."""
    if config.eval.inception is None:
        log.info("no evaluation during training, since config.eval.inception names no Inception weights")
        return []
    scoring = scorer.scoring_during_training(config, after_chunk=partial(signals.stop_if_asked, stop_signal))
    reference = scorer.reference_of(config)
    spec = build.sampler_spec(config.sample)
    all_weights = [stored_weights(weights, config.ema) for weights in config.eval.weights]
    scoring.ids(reference, class_names)  # raises now what it would raise then

    def evaluate(step: int, state: TrainState) -> None:
        for i, (name, average) in enumerate(all_weights):
            record = scorer.score(
                scoring,
                spec,
                draw,
                state.params if average is None else state.ema[average],
                step=step,
                weights=name,
                class_names=class_names,
                recipe=build.recipe(config),
                reference=reference,
                workdir=workdir,
            )
            numbers = scorer.numbers_of(record)
            if i == 0:
                add_score(step, next(iter(numbers.values())))
            recorder.scalars(step, numbers)
            scorer.print_record(record)

    def act(step: int, state: TrainState) -> None:
        try:
            evaluate(step, state)
        except signals.Stopped:  # the loop asks next, saves and stops; a resumed run goes on with this evaluation
            pass
        except (OSError, ValueError, RuntimeError) as error:
            of_the_training = isinstance(error, SaveError | jax.errors.JaxRuntimeError)
            if of_the_training or jax.process_count() > 1:  # others would wait for this process
                raise
            log.error(
                "the evaluation of step %d failed, the training goes on: %s. Once that is mended: python -m "
                "fooddiff.eval run --workdir=%s --step=%d ...",
                step, error, workdir, step,
            )  # fmt: skip

    return [Periodic(config.eval.every_steps, act)]


def _draw_grids(
    config: ConfigDict,
    draw: Draw,
    plain_draw: Draw | None,
    dataset: Dataset,
    workdir: Path,
    recorder: Recorder | NoRecorder,
    step: int,
    state: TrainState,
) -> None:
    """Writes samples/step_<step>_<name>.png where it is missing: of the raw weights and of the first average.

    Where config.sample guides, the average draws a second grid without guidance, <weights>_unguided. The mean colours
    of every grid are compared with those of training images of its classes, and samples/<name>/colour_spread_ratio is
    recorded.
    """
    names = tuple(config.sample.classes) or dataset.class_names[:12]
    classes = class_ids(dataset.class_names, names)
    ids = sample_ids(classes, config.sample.per_class)
    key = jax.random.key(GRID_SEED)
    averages = {f"ema_{rate}": state.ema[str(rate)] for rate in config.ema.rates[:1]}
    grids = [(name, draw, params) for name, params in ({"raw": state.params} | averages).items()]
    if plain_draw is not None:
        grids += [(f"{name}_unguided", plain_draw, params) for name, params in averages.items()]
    for name, compiled, params in grids:
        path = workdir / "samples" / f"step_{step:07d}_{name}.png"
        if not processes.first_says(is_grid(path)):
            images = np.concatenate(list(draw_batches(compiled, params, key, ids, config.sample.batch_size)))
            if processes.is_first():
                grid = class_grid(images.reshape(len(names), config.sample.per_class, *images.shape[1:]), names)
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, png_bytes(grid))
                recorder.picture(step, f"samples/{name}", path)
        if processes.is_first():  # from the file: a run that was killed may have left it without its record
            _record_colours(recorder, step, name, read_grid(path), dataset)


def _draw_one_steps(
    config: ConfigDict,
    one_step: OneStep,
    captions: list[str],
    dataset: Dataset,
    workdir: Path,
    recorder: Recorder | NoRecorder,
    step: int,
    state: TrainState,
) -> None:
    """Writes samples/step_<step>_<weights>_one_step.png where it is missing: a column for each level of noise.

    Its rows are a training image, the same with noise, and what the first average (or, without one, the raw weights)
    makes of that in one step; for the first image of each of the first `ONE_STEP_IMAGES` classes.
    """
    name, params = next(
        ((f"ema_{rate}", state.ema[str(rate)]) for rate in config.ema.rates), ("raw", state.params)
    )  # fmt: skip
    path = workdir / "samples" / f"step_{step:07d}_{name}_one_step.png"
    if processes.first_says(is_grid(path)):
        return
    labels, rows = np.unique(dataset.labels, return_index=True)
    labels, rows = labels[:ONE_STEP_IMAGES].astype(np.int32), rows[:ONE_STEP_IMAGES]
    shown = np.asarray(one_step(params, jax.random.key(GRID_SEED), dataset.images[rows], labels))
    if processes.is_first():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, png_bytes(class_grid(shown, captions)))
        recorder.picture(step, f"samples/{name}_one_step", path)


def _record_colours(recorder: Recorder | NoRecorder, step: int, name: str, grid: Grid, dataset: Dataset) -> None:
    """Records how much the mean colours of samples spread over how much those of the data do, if it has the classes.

    Warns if that is far off 1.
    """
    images = grid.images.reshape(-1, *grid.images.shape[2:])
    classes = class_ids(dataset.class_names, grid.class_names)
    real = np.flatnonzero(np.isin(dataset.labels, classes))
    if len(real) < 2 or len(images) < 2:
        return
    real = real[:: -(-len(real) // MAX_REAL_IMAGES)]
    ratio = float((colour_spread(images) / colour_spread(dataset.images[real])).mean())
    recorder.scalars(step, {f"samples/{name}/colour_spread_ratio": ratio})
    if is_suspicious(ratio):
        log.warning(
            "step %d, %s: the mean colours of samples spread %.2f times as much as those of real images; "
            "expected about 1 once a model draws its classes",
            step, name, ratio,
        )  # fmt: skip
