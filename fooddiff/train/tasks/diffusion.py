"""Training a denoiser: draws levels and noise for a batch, and reduces the loss terms."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Cond, Float, Image, Int, Key, PerExample, PyTree
from fooddiff.codec import Codec
from fooddiff.diffusion import continuous
from fooddiff.diffusion.denoiser import Denoiser
from fooddiff.diffusion.discrete import GaussianDiffusion, transition_at
from fooddiff.diffusion.timesteps import (
    empty_history,
    sample_t,
    second_moment_probs,
    uniform_probs,
    update_history,
)
from fooddiff.keys import stream
from fooddiff.model.network import Network
from fooddiff.train.task import Task

LOG_SNR_EDGES = (-8, -4, -2, 0, 2, 4, 8)


class Examples(NamedTuple):
    """A batch with everything random already drawn; can be split along n without changing any number."""

    x_0: Image
    time: Int[Array, " n"] | Float[Array, " n"]  # which level: a timestep, or a log SNR
    weight: PerExample  # importance weight of the time
    eps: Image
    cond: Cond


class Times(NamedTuple):
    """At which levels a denoiser is trained; `carried` is what an importance sampler takes along."""

    init: Callable[[], PyTree]
    draw: Callable[[PyTree, Key, int], tuple[Array, PerExample]]  # (carried, key, n) -> (time, its weight)
    observe: Callable[[PyTree, Array, PerExample], PyTree]  # (carried, time, loss) -> carried
    at: Callable[[Array], Any]  # time -> Transition or Level, for the loss
    bin: Callable[[Array], Int[Array, " n"]]  # time -> which of `bins`
    bins: Sequence[str]  # names of the metrics that hold the loss by level


def uniform_timesteps(process: GaussianDiffusion) -> Times:
    """Every timestep of a discrete process alike."""
    return Times(
        init=lambda: None,
        draw=lambda carried, key, n: sample_t(key, n, uniform_probs(process.num_timesteps)),
        observe=lambda carried, t, loss: None,
        at=partial(transition_at, process),
        bin=lambda t: t * 4 // process.num_timesteps,
        bins=tuple(f"loss_q{i}" for i in (1, 2, 3, 4)),
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
        bins=tuple(f"loss_log_snr_{name}" for name in names),
    )


def make_diffusion_task(
    network: Network,
    codec: Codec,
    times: Times,
    make_denoiser: Callable[[Callable], Denoiser],
    loss_terms: Callable[..., Any],
    *,
    terms: Sequence[str],
    conditional: bool,
    dropout: bool,
    label_dropout: float = 0.0,
    null_label: int | None = None,
) -> Task:
    """Builds the task of a diffusion model.

    Args:
        network: the network.
        codec: between pixels and what is diffused.
        times: at which levels to train.
        make_denoiser: (apply) -> denoiser.
        loss_terms: (denoise, x_0, level or transition, eps, cond) -> a NamedTuple of f32[n], among them `total`.
        terms: its other fields.
        conditional: whether the network sees the conditions of a batch.
        dropout: whether the network gets a dropout key.
        label_dropout: share of the examples, in [0, 1), whose label is the null label, for classifier-free guidance.
        null_label: the label that means none.

    Returns:
        The task.
    """

    def draw(carried, batch, key):
        n = len(batch.pixels)
        time, weight = times.draw(carried, stream(key, "t"), n)
        x_0 = codec.encode(batch.pixels)
        eps = jax.random.normal(stream(key, "eps"), x_0.shape)
        cond = batch.cond if conditional else {}
        if label_dropout:
            dropped = jax.random.uniform(stream(key, "label"), (n,)) < label_dropout
            cond = {**cond, "y": jnp.where(dropped, null_label, cond["y"])}
        return Examples(x_0, time, weight, eps, cond)

    def loss(params, examples, key):
        denoise = make_denoiser(partial(network.apply, params, dropout_key=key if dropout else None))
        found = loss_terms(denoise, examples.x_0, times.at(examples.time), examples.eps, examples.cond)
        return (examples.weight * found.total).mean(), found

    def observe(carried, examples, found):
        n = jnp.full((), len(examples.weight), jnp.float32)
        reported = {"loss": found.total} | {name: getattr(found, name) for name in terms}
        sums = {name: jnp.stack([(examples.weight * term).sum(), n]) for name, term in reported.items()}
        bin_of = times.bin(examples.time)
        for i, name in enumerate(times.bins):
            inside = (bin_of == i).astype(jnp.float32)
            sums[name] = jnp.stack([(inside * found.total).sum(), inside.sum()])
        return times.observe(carried, examples.time, found.total), sums

    return Task(network.init, times.init, draw, loss, observe, ("loss", *terms, *times.bins))
