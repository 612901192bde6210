"""At which levels of noise a network is trained, and metrics by level."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp

from fooddiff.arrays import Array, Int, Key, PerExample, PyTree
from fooddiff.diffusion import continuous
from fooddiff.diffusion.discrete import GaussianDiffusion, transition_at
from fooddiff.diffusion.timesteps import (
    empty_history,
    sample_t,
    second_moment_probs,
    uniform_probs,
    update_history,
)
from fooddiff.train.task import Sums

LOG_SNR_EDGES = (-8, -4, -2, 0, 2, 4, 8)


class Times(NamedTuple):
    """At which levels a network is trained; `carried` is what an importance sampler takes along."""

    init: Callable[[], PyTree]
    draw: Callable[[PyTree, Key, int], tuple[Array, PerExample]]  # (carried, key, n) -> (time, its weight)
    observe: Callable[[PyTree, Array, PerExample], PyTree]  # (carried, time, loss) -> carried
    at: Callable[[Array], Any]  # time -> Transition or Level, for the loss
    bin: Callable[[Array], Int[Array, " n"]]  # time -> which of `bins`
    bins: Sequence[str]  # their names


def uniform_timesteps(process: GaussianDiffusion) -> Times:
    """Every timestep of a discrete process alike."""
    return Times(
        init=lambda: None,
        draw=lambda carried, key, n: sample_t(key, n, uniform_probs(process.num_timesteps)),
        observe=lambda carried, t, loss: None,
        at=partial(transition_at, process),
        bin=lambda t: t * 4 // process.num_timesteps,
        bins=tuple(f"q{i}" for i in (1, 2, 3, 4)),
    )


def important_timesteps(process: GaussianDiffusion) -> Times:
    """Timesteps of a discrete process by the second moment of past losses (IDDPM section 3.3)."""
    return uniform_timesteps(process)._replace(
        init=lambda: empty_history(process.num_timesteps),
        draw=lambda history, key, n: sample_t(key, n, second_moment_probs(history)),
        observe=update_history,
    )


def log_snrs(density: continuous.Density) -> Times:
    """Log SNRs of a continuous process from a density, which weights the loss by itself."""
    inner = [f"{low}_to_{high}" for low, high in pairwise(LOG_SNR_EDGES)]
    names = [f"below_{LOG_SNR_EDGES[0]}", *inner, f"above_{LOG_SNR_EDGES[-1]}"]
    return Times(
        init=lambda: None,
        draw=lambda carried, key, n: (density(key, n), jnp.ones(n)),
        observe=lambda carried, log_snr, loss: None,
        at=continuous.level_of,
        bin=lambda log_snr: jnp.searchsorted(jnp.array(LOG_SNR_EDGES, jnp.float32), log_snr),
        bins=tuple(f"log_snr_{name}" for name in names),
    )


def names_by_level(times: Times, metric: str) -> tuple[str, ...]:
    """The names of `by_level`."""
    return tuple(f"{metric}_{name}" for name in times.bins)


def by_level(times: Times, metric: str, time: Array, values: PerExample) -> Sums:
    """Divides a metric among the bins of the level at which each value was found."""
    bin_of, sums = times.bin(time), {}
    for i, name in enumerate(names_by_level(times, metric)):
        inside = (bin_of == i).astype(jnp.float32)
        sums[name] = jnp.stack([(inside * values).sum(), inside.sum()])
    return sums
