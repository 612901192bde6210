"""A training task as pure functions: what the state, the step, the loop and the records know of what is trained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fooddiff.arrays import Array, Batch, Float, Key, Params, PyTree, Scalar

Sums = Mapping[str, Float[Array, "2"]]
"""Metrics as (sum, count), so that they add up over steps and microbatches."""


class Task(NamedTuple):
    """What one training step minimises. `carried` is what a task takes along from step to step; None for nothing."""

    init: Callable[[Key], Params]
    init_carried: Callable[[Key], PyTree]
    draw: Callable[[PyTree, Batch, Key], PyTree]
    """(carried, batch, key) -> examples: the batch with everything random drawn. Its leaves have the batch axis first,
    so that it can be split without changing any number."""
    loss: Callable[[Params, PyTree, PyTree, Key], tuple[Scalar, Any]]
    """(params, carried, examples, key for dropout) -> (mean loss, terms: a NamedTuple whose leaves have the batch axis
    first, with the field `total`, f32[n])."""
    observe: Callable[[PyTree, PyTree, Any], tuple[PyTree, Sums]]
    """(carried, examples, terms) -> (carried, metrics). What is carried may learn here, too."""
    metrics: Sequence[str]  # the names of those metrics
