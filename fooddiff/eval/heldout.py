"""The metrics of a training task on held-out images, as the task itself computes them."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np

from fooddiff import parallel
from fooddiff.arrays import Batch, Key, Params
from fooddiff.data.cache import Dataset
from fooddiff.keys import stream
from fooddiff.train.task import Sums, Task
from fooddiff.xla import jit

Measure = Callable[[Params, Batch, Key], Sums]


def make_measure(task: Task, mesh: jax.sharding.Mesh) -> Measure:
    """Compiles (params, batch, key) -> the sums of the task's metrics, with the batch spread over the devices."""
    replicated, over_data = parallel.replicated(mesh), parallel.over_data(mesh)

    @partial(jit, out_shardings=replicated)
    def measure(params, batch, key):
        batch = jax.lax.with_sharding_constraint(batch, over_data)
        carried = task.init_carried(stream(key, "carried"))
        examples = task.draw(carried, batch, stream(key, "heldout"))
        _, terms = task.loss(params, carried, examples, stream(key, "dropout"))
        return task.observe(carried, examples, terms)[1]

    return measure


def heldout_metrics(
    measure: Measure, params: Params, dataset: Dataset, rows: np.ndarray, *, batch_size: int, key: Key
) -> Mapping[str, float]:
    """The mean metrics over some images. What is random depends on the key and on the order of `rows` alone.

    Args:
        measure: from `make_measure`.
        params: the weights.
        dataset: images and labels.
        rows: which of them, a multiple of `batch_size`.
        batch_size: a multiple of the number of devices.
        key: of noise and levels.

    Returns:
        {metric: mean}; a mean over no examples is left out.
    """
    total = None
    for number, chunk in enumerate(np.split(rows, len(rows) // batch_size)):
        batch = Batch(np.asarray(dataset.images[chunk]), {"y": np.asarray(dataset.labels[chunk])})
        sums = jax.device_get(measure(params, batch, jax.random.fold_in(key, number)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return {name: float(value / count) for name, (value, count) in total.items() if count > 0}
