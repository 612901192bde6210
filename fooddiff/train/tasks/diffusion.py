"""Training a denoiser: draws levels and noise for a batch, and reduces the loss terms."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Cond, Float, Image, Int, PerExample
from fooddiff.codec import Codec
from fooddiff.diffusion.denoiser import Denoiser
from fooddiff.diffusion.level import per_image
from fooddiff.keys import stream
from fooddiff.low_res import LowRes, shrink
from fooddiff.model.network import Network
from fooddiff.train.task import Task
from fooddiff.train.times import Times, by_level, names_by_level


class Examples(NamedTuple):
    """A batch with everything random already drawn; can be split along n without changing any number."""

    x_0: Image
    time: Int[Array, " n"] | Float[Array, " n"]  # which level: a timestep, or a log SNR
    weight: PerExample  # importance weight of the time
    eps: Image
    cond: Cond


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
    low_res: LowRes | None = None,
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
        low_res: the small image that a network for super-resolution is shown; None for all others.

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
        if low_res is not None:
            small = shrink(x_0, low_res.size)
            level = low_res.max_noise * jax.random.uniform(stream(key, "low_res level"), (n,))
            noise = jax.random.normal(stream(key, "low_res"), small.shape)
            cond = {**cond, "low_res": small + per_image(level) * noise}
        return Examples(x_0, time, weight, eps, cond)

    def loss(params, carried, examples, key):
        denoise = make_denoiser(partial(network.apply, params, dropout_key=key if dropout else None))
        found = loss_terms(denoise, examples.x_0, times.at(examples.time), examples.eps, examples.cond)
        return (examples.weight * found.total).mean(), found

    def observe(carried, examples, found):
        n = jnp.full((), len(examples.weight), jnp.float32)
        reported = {"loss": found.total} | {name: getattr(found, name) for name in terms}
        sums = {name: jnp.stack([(examples.weight * term).sum(), n]) for name, term in reported.items()}
        sums |= by_level(times, "loss", examples.time, found.total)
        return times.observe(carried, examples.time, found.total), sums

    return Task(
        network.init, lambda key: times.init(), draw, loss, observe, ("loss", *terms, *names_by_level(times, "loss"))
    )
