"""Training an autoencoder: the error of its reconstructions plus what its bottleneck charges."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Image, Key, Params, PerExample
from fooddiff.codec import to_signed
from fooddiff.keys import stream
from fooddiff.model import bottleneck
from fooddiff.train.task import Task

PEAK = 2.0  # from black to white, in images in [-1, 1]
METRICS = ("loss", "reconstruction", "penalty", "psnr")


class Examples(NamedTuple):
    """A batch with everything random already drawn."""

    x: Image
    noise: Image  # standard normal, of the latents


class Terms(NamedTuple):
    """What one image costs."""

    total: PerExample
    reconstruction: PerExample  # mean error of the image
    penalty: PerExample  # of the bottleneck, without its weight
    psnr: PerExample  # dB; of the reconstruction before it is rounded


class Passage(NamedTuple):
    """What a bottleneck makes of an encoder's output in training."""

    z: Image  # what the decoder takes
    penalty: PerExample
    cost: PerExample  # the penalty, weighted


Bottleneck = Callable[[Params, Array, Image], Passage]
"""(params, the encoder's output, noise) -> what passes."""


def gaussian(params: Params, moments: Array, noise: Image, *, weight: float) -> Passage:
    """Draws from the posterior and charges its KL divergence from the standard normal one, in nats per dimension."""
    posterior = bottleneck.posterior_of(moments)
    kl = bottleneck.kl_divergence(posterior) / math.prod(noise.shape[1:])
    return Passage(bottleneck.draw(posterior, noise), kl, weight * kl)


def codebook(params: Params, z: Array, noise: Image, *, weight: float, beta: float) -> Passage:
    """Takes the nearest codes and charges the mean squared distance to them, see `quantize`."""
    quantize = partial(bottleneck.quantize, codebook=params["codebook"], beta=beta)
    found = jax.vmap(lambda one: quantize(one[None]))(z)
    return Passage(found.z[:, 0], found.loss, weight * found.loss)


def no_bottleneck(params: Params, z: Array, noise: Image) -> Passage:
    """Lets everything pass for nothing."""
    free = jnp.zeros(len(z))
    return Passage(z, free, free)


def absolute_error(x: Image, reconstruction: Image) -> PerExample:
    """Mean |difference| of every image: f32[n]."""
    return jnp.abs(x - reconstruction).mean(axis=(1, 2, 3))


def squared_error(x: Image, reconstruction: Image) -> PerExample:
    """Mean squared difference of every image: f32[n]."""
    return ((x - reconstruction) ** 2).mean(axis=(1, 2, 3))


def psnr(x: Image, reconstruction: Image) -> PerExample:
    """Peak signal-to-noise ratio of every image in dB: f32[n]."""
    return 10 * jnp.log10(PEAK**2 / squared_error(x, reconstruction))


def make_autoencoder_task(
    init: Callable[[Key], Params],
    encode: Callable[..., Array],
    decode: Callable[..., Image],
    latent_shape: tuple[int, int, int],
    bottleneck: Bottleneck,
    error: Callable[[Image, Image], PerExample],
    *,
    dropout: bool,
) -> Task:
    """Builds the task of an autoencoder.

    Args:
        init: key -> params.
        encode: (params, x, dropout_key=...) -> the encoder's output.
        decode: (params, z, dropout_key=...) -> the reconstruction.
        latent_shape: (h, w, c) of the latents.
        bottleneck: what lies between.
        error: of reconstructions.
        dropout: whether the network gets dropout keys.

    Returns:
        The task.
    """

    def draw(carried, batch, key):
        noise = jax.random.normal(stream(key, "noise"), (len(batch.pixels), *latent_shape))
        return Examples(to_signed(batch.pixels), noise)

    def loss(params, examples, key):
        keys = jax.random.split(key) if dropout else (None, None)
        encoded = encode(params, examples.x, dropout_key=keys[0])
        passage = bottleneck(params, encoded, examples.noise)
        decoded = decode(params, passage.z, dropout_key=keys[1])
        reconstruction = error(examples.x, decoded)
        total = reconstruction + passage.cost
        return total.mean(), Terms(total, reconstruction, passage.penalty, psnr(examples.x, decoded))

    def observe(carried, examples, terms):
        n = jnp.full((), len(terms.total), jnp.float32)
        reported = terms._asdict() | {"loss": terms.total}
        return carried, {name: jnp.stack([reported[name].sum(), n]) for name in METRICS}

    return Task(init, lambda: None, draw, loss, observe, METRICS)
