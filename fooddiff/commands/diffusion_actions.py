"""What the training of a diffusion model does beside its steps: it draws grids and scores samples."""

import logging
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from fooddiff import build, processes
from fooddiff.arrays import Pixels
from fooddiff.commands import scorer, signals
from fooddiff.commands.actions import Actions, Surroundings
from fooddiff.data.cache import Dataset
from fooddiff.files.atomic import write_atomically
from fooddiff.runs.checkpoint import SaveError
from fooddiff.runs.load import class_ids, stored_weights
from fooddiff.runs.record import NoRecorder, Recorder
from fooddiff.sample.colour import colour_spread, is_suspicious
from fooddiff.sample.enlarge import Enlarge, of_real
from fooddiff.sample.generate import Draw, draw_batches, sample_ids
from fooddiff.sample.grid import Grid, class_grid, is_grid, png_bytes, read_grid
from fooddiff.sample.one_step import OneStep
from fooddiff.settings import check_batch_size, check_positive
from fooddiff.train.loop import Periodic
from fooddiff.train.state import TrainState

log = logging.getLogger(__name__)

MAX_REAL_IMAGES = 2000  # whose colours samples are compared with
ONE_STEP_IMAGES = 3
GRID_SEED = 0  # the grids of all runs start from the same noise, so that they can be compared


def make_actions(config: ConfigDict, model: build.DiffusionModel, mesh: jax.sharding.Mesh) -> Actions:
    """The actions that config.sample and config.eval ask for.

    Raises:
        ConfigError: a value that cannot be.
    """
    draws = _grid_draws(config, model, mesh)
    one_step = build.make_one_step(model, mesh)
    check_positive("eval.every_steps", config.eval.every_steps)
    return Actions(
        check_data=lambda dataset: class_ids(dataset.class_names, tuple(config.sample.classes)),
        periodic=lambda around: [
            Periodic(config.sample.every_steps, partial(_draw_grids, config, model, *draws, around)),
            Periodic(config.sample.every_steps, partial(_draw_one_steps, config, *one_step, around)),
            *_evaluations(config, model, draws[0], around),
        ],
        next_command="python run_sample.py --workdir={}"
        if model.low_res is None
        else "python -m fooddiff.eval superres --workdir={} --inception=...",
    )


def _grid_draws(
    config: ConfigDict, model: build.DiffusionModel, mesh: jax.sharding.Mesh
) -> tuple[Draw | Enlarge, Draw | Enlarge | None]:
    """The compiled sampler of config.sample and, if that guides, the same without guidance."""
    sample = config.sample
    for field in ("every_steps", "per_class"):
        check_positive(f"sample.{field}", sample[field])
    check_batch_size("sample.batch_size", sample.batch_size, mesh.size)
    spec = build.sampler_spec(sample)
    plain = None if spec.guidance == 1 else build.sampler_spec(sample, guidance=1.0)
    return build.make_sampler(model, mesh, spec), plain and build.make_sampler(model, mesh, plain)


def _of_ids(model: build.DiffusionModel, draw: Draw | Enlarge, images: Pixels, labels: np.ndarray) -> Draw:
    """A sampler of ids alone: that of a model for super-resolution enlarges small versions of these images."""
    return draw if model.low_res is None else of_real(draw, images, labels)


def _evaluations(
    config: ConfigDict, model: build.DiffusionModel, draw: Draw | Enlarge, around: Surroundings
) -> list[Periodic]:
    """The evaluation during training that config.eval asks for, if any; a step's first number is its score.

    A model for super-resolution enlarges images of the test split for it.
    """
    if config.eval.inception is None:
        log.info("no evaluation during training, since config.eval.inception names no Inception weights")
        return []
    scoring = scorer.scoring_during_training(config, after_chunk=partial(signals.stop_if_asked, around.stop_signal))
    reference = scorer.reference_of(config)
    draw = _of_ids(model, draw, reference.pixels, reference.labels)
    enlarges = {} if model.low_res is None else {"enlarges": reference.identity["sha256"]}
    spec = build.sampler_spec(config.sample)
    all_weights = [stored_weights(weights, config.ema) for weights in config.eval.weights]
    scoring.ids(reference, around.dataset.class_names)  # raises now what it would raise then

    def evaluate(step: int, state: TrainState) -> None:
        for i, (name, average) in enumerate(all_weights):
            record = scorer.score(
                scoring,
                spec,
                draw,
                around.codec | (state.params if average is None else state.ema[average]),
                step=step,
                weights=name,
                class_names=around.dataset.class_names,
                recipe=build.recipe(config) | enlarges,
                reference=reference,
                workdir=around.workdir,
            )
            numbers = scorer.numbers_of(record)
            if i == 0:
                around.add_score(step, next(iter(numbers.values())))
            around.recorder.scalars(step, numbers)
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
                step, error, around.workdir, step,
            )  # fmt: skip

    return [Periodic(config.eval.every_steps, act)]


def _draw_grids(
    config: ConfigDict,
    model: build.DiffusionModel,
    draw: Draw | Enlarge,
    plain_draw: Draw | Enlarge | None,
    around: Surroundings,
    step: int,
    state: TrainState,
) -> None:
    """Writes samples/step_<step>_<name>.png where it is missing: of the raw weights and of the first average.

    Where config.sample guides, the average draws a second grid without guidance, <weights>_unguided. The mean colours
    of every grid are compared with those of training images of its classes, and samples/<name>/colour_spread_ratio is
    recorded. A model for super-resolution enlarges training images: the first ones of each class.
    """
    dataset, recorder = around.dataset, around.recorder
    names = tuple(config.sample.classes) or dataset.class_names[:12]
    classes = class_ids(dataset.class_names, names)
    ids = sample_ids(classes, config.sample.per_class)
    key = jax.random.key(GRID_SEED)
    averages = {f"ema_{rate}": state.ema[str(rate)] for rate in config.ema.rates[:1]}
    grids = [(name, draw, params) for name, params in ({"raw": state.params} | averages).items()]
    if plain_draw is not None:
        grids += [(f"{name}_unguided", plain_draw, params) for name, params in averages.items()]
    for name, compiled, params in grids:
        path = around.workdir / "samples" / f"step_{step:07d}_{name}.png"
        if not processes.first_says(is_grid(path)):
            compiled = _of_ids(model, compiled, dataset.images, dataset.labels)
            drawn = draw_batches(compiled, around.codec | params, key, ids, config.sample.batch_size)
            images = np.concatenate(list(drawn))
            if processes.is_first():
                grid = class_grid(images.reshape(len(names), config.sample.per_class, *images.shape[1:]), names)
                write_atomically(path, png_bytes(grid))
        if processes.is_first():  # from the file: a run that was killed may have left it without its record
            recorder.picture(step, f"samples/{name}", path)
            _record_colours(recorder, step, name, read_grid(path), dataset)


def _draw_one_steps(
    config: ConfigDict, one_step: OneStep, captions: list[str], around: Surroundings, step: int, state: TrainState
) -> None:
    """Writes samples/step_<step>_<weights>_one_step.png where it is missing: a column for each level of noise.

    Its rows are a training image, the same with noise, and what the first average (or, without one, the raw weights)
    makes of that in one step; for the first image of each of the first `ONE_STEP_IMAGES` classes.
    """
    dataset = around.dataset
    name, params = next(((f"ema_{rate}", state.ema[str(rate)]) for rate in config.ema.rates), ("raw", state.params))
    path = around.workdir / "samples" / f"step_{step:07d}_{name}_one_step.png"
    if not processes.first_says(is_grid(path)):
        labels, rows = np.unique(dataset.labels, return_index=True)
        labels, rows = labels[:ONE_STEP_IMAGES].astype(np.int32), rows[:ONE_STEP_IMAGES]
        stored = around.examples.take(rows, np.zeros(len(rows), bool))
        shown = np.asarray(one_step(around.codec | params, jax.random.key(GRID_SEED), stored, labels))
        if processes.is_first():
            write_atomically(path, png_bytes(class_grid(shown, captions)))
    if processes.is_first():
        around.recorder.picture(step, f"samples/{name}_one_step", path)


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
