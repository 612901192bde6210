"""What the training of a classifier does beside its steps: it classifies held-out images."""

import logging
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from fooddiff import build
from fooddiff.commands.actions import Actions, Surroundings
from fooddiff.commands.likelihood import balanced_rows
from fooddiff.data.cache import Dataset
from fooddiff.eval.heldout import heldout_metrics, make_measure
from fooddiff.runs.load import stored_weights
from fooddiff.settings import ConfigError, check_batch_size
from fooddiff.train.loop import Periodic
from fooddiff.train.state import TrainState

log = logging.getLogger(__name__)

SEED = 0  # of the noise of held-out images, the same for all runs and steps


def make_actions(config: ConfigDict, model: build.ClassifierModel, mesh: jax.sharding.Mesh) -> Actions:
    """The accuracy on held-out images that config.eval asks for.

    Raises:
        ConfigError: a value that cannot be.
    """
    check_batch_size("eval.batch_size", config.eval.batch_size, mesh.size)
    if not config.eval.weights:
        raise ConfigError("config.eval.weights is empty, expected raw, ema or ema_<rate>")
    all_weights = [stored_weights(weights, config.ema) for weights in config.eval.weights]
    measure = make_measure(build.heldout_task(model), mesh)

    def periodic(around: Surroundings) -> list[Periodic]:
        heldout, rows = _heldout(config, around.dataset)
        act = partial(_measure, config, measure, all_weights, heldout, rows, around)
        return [Periodic(config.eval.every_steps, act)]

    judge = "python -m fooddiff.eval agreement --workdir=RUN --judge={}"
    guide = "python run_sample.py --workdir=RUN --classifier={} --classifier_scale=1"
    return Actions(
        check_data=partial(_heldout, config), periodic=periodic, next_command=judge if model.noise is None else guide
    )


def _heldout(config: ConfigDict, dataset: Dataset) -> tuple[Dataset, np.ndarray]:
    """The held-out images and the rows of those to classify, evenly over the classes."""
    heldout, count = build.make_heldout(config, dataset.class_names), config.eval.batches * config.eval.batch_size
    if count > len(heldout.labels):
        raise ConfigError(
            f"config.eval.batches {config.eval.batches} times config.eval.batch_size {config.eval.batch_size} are "
            f"{count:,} images, but the test split has {len(heldout.labels):,}"
        )
    return heldout, balanced_rows(heldout.labels, count)


def _measure(
    config: ConfigDict,
    measure: Callable,
    all_weights: list[tuple[str, str | None]],
    heldout: Dataset,
    rows: np.ndarray,
    around: Surroundings,
    step: int,
    state: TrainState,
) -> None:
    """Records every metric on held-out images under eval/<weights>/; the error of the first weights is the score."""
    for i, (name, average) in enumerate(all_weights):
        params = state.params if average is None else state.ema[average]
        found = heldout_metrics(
            measure, params, heldout, rows, batch_size=config.eval.batch_size, key=jax.random.key(SEED)
        )
        if i == 0:
            around.add_score(step, 1 - found["top1"])
        around.recorder.scalars(step, {f"eval/{name}/{metric}, n={len(rows)}": found[metric] for metric in found})
        log.info(
            "step %d, %s: top-1 %.1f %%, top-5 %.1f %%, loss %.3f of %s held-out images",
            step, name, 100 * found["top1"], 100 * found["top5"], found["loss"], f"{len(rows):,}",
        )  # fmt: skip
