"""Everything that a training run carries from step to step. A resumed run differs from this in nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from fooddiff.arrays import Array, Float, Int, Key, Params, PyTree
from fooddiff.keys import stream
from fooddiff.train.task import Task

NORMS = ("grad_norm", "param_norm", "update_norm")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state between two steps."""

    step: Int[Array, ""]  # steps done
    params: Params
    ema: dict[str, Params]  # averages by name, for instance "0.9999"
    opt_state: optax.OptState
    carried: PyTree  # what the task takes along: the history of a timestep sampler, an adversary, ...
    sums: dict[str, Float[Array, "2"]]  # metrics since the last log point, as (sum, count)
    skipped: Int[Array, ""]  # consecutive steps without an update because a gradient was not finite
    skipped_total: Int[Array, ""]


def init_state(key: Key, task: Task, optimizer: optax.GradientTransformation, averages: Iterable[str]) -> TrainState:
    """Draws the state before the first step; call it inside jit, so that every leaf has a buffer of its own.

    Args:
        key: the run's root key.
        task: what is trained.
        optimizer: the optimizer.
        averages: names of the averages.

    Returns:
        The state, with every average equal to the parameters.
    """
    params = task.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={name: jax.tree.map(jnp.copy, params) for name in averages},
        opt_state=optimizer.init(params),
        carried=task.init_carried(stream(key, "carried")),
        sums=zero_sums((*task.metrics, *NORMS)),
        skipped=jnp.zeros((), jnp.int32),
        skipped_total=jnp.zeros((), jnp.int32),
    )


def zero_sums(metrics: Sequence[str]) -> dict[str, Float[Array, "2"]]:
    """Metrics at the start of a log window."""
    return {name: jnp.zeros((2,)) for name in metrics}
