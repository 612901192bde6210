"""Everything that a training run carries from step to step. A resumed run differs from this in nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from fooddiff.arrays import Array, Float, Int, Key, Params
from fooddiff.diffusion.timesteps import LossHistory
from fooddiff.model.network import Network
from fooddiff.train.objective import Objective

METRICS = ("loss", "mse", "vb", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "grad_norm", "param_norm", "update_norm")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state between two steps."""

    step: Int[Array, ""]  # steps done
    params: Params
    ema: dict[str, Params]  # by rate, for instance "0.9999"
    opt_state: optax.OptState
    history: LossHistory | None  # of the timestep sampler
    sums: dict[str, Float[Array, "2"]]  # metrics since the last log point, as (sum, count)
    skipped: Int[Array, ""]  # consecutive steps without an update because a gradient was not finite
    skipped_total: Int[Array, ""]


def init_state(
    key: Key,
    network: Network,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    ema_rates: Sequence[float],
) -> TrainState:
    """Draws the state before the first step; call it inside jit, so that every leaf has a buffer of its own.

    Args:
        key: the run's root key.
        network: the denoiser.
        optimizer: the optimizer.
        objective: the objective.
        ema_rates: decay rates of the averages, each in [0, 1).

    Returns:
        The state, with every average equal to the parameters.
    """
    params = network.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={str(rate): jax.tree.map(jnp.copy, params) for rate in ema_rates},
        opt_state=optimizer.init(params),
        history=objective.init(),
        sums=zero_sums(),
        skipped=jnp.zeros((), jnp.int32),
        skipped_total=jnp.zeros((), jnp.int32),
    )


def zero_sums() -> dict[str, Float[Array, "2"]]:
    """Metrics at the start of a log window."""
    return {name: jnp.zeros((2,)) for name in METRICS}
