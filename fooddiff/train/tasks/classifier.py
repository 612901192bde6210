"""Training a classifier of images, clean or noisy: draws levels, noise and crops, and reduces the cross entropy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Float, Image, Label, PerExample
from fooddiff.codec import Codec
from fooddiff.diffusion.level import Level, add_noise, clean_level
from fooddiff.keys import stream
from fooddiff.model.network import Network
from fooddiff.train.task import Task
from fooddiff.train.times import Times, by_level, names_by_level

TOP = 5


class Examples(NamedTuple):
    """A batch with everything random already drawn; can be split along n without changing any number."""

    x_t: Image
    time: Array | None  # which level: a timestep, or a log SNR; None where no noise was added
    network_time: PerExample
    y: Label


class Terms(NamedTuple):
    """What is known of each example, f32[n]."""

    total: PerExample  # cross entropy in nats
    top1: PerExample  # 1 where the label is the most probable class
    top5: PerExample  # 1 where it is among the five most probable ones


def make_classifier_task(
    network: Network,
    codec: Codec,
    *,
    noise: Times | None,
    network_time: Callable[[Level], PerExample],
    crop: int,
    dropout: bool,
) -> Task:
    """Builds the task of a classifier, which minimises the mean cross entropy.

    Args:
        network: (params, x_t, network_time) -> logits.
        codec: between pixels and what is classified.
        noise: at which levels to train, `at` being the level itself; None trains on the images as they are.
        network_time: what the network is fed at a level.
        crop: images are moved by up to so many pixels in both directions, at random, their edges repeated.
        dropout: whether the network gets a dropout key.

    Returns:
        The task.
    """

    def draw(carried, batch, key):
        n = len(batch.pixels)
        x_0 = codec.encode(batch.pixels)
        if crop:
            x_0 = moved(x_0, jax.random.randint(stream(key, "crop"), (n, 2), 0, 2 * crop + 1), crop)
        if noise is None:
            clean = jax.tree.map(lambda number: jnp.full((n,), number), clean_level())
            return Examples(x_0, None, network_time(clean), batch.cond["y"])
        time, _ = noise.draw(carried, stream(key, "t"), n)
        level = noise.at(time)
        x_t = add_noise(level, x_0, jax.random.normal(stream(key, "eps"), x_0.shape))
        return Examples(x_t, time, network_time(level), batch.cond["y"])

    def loss(params, carried, examples, key):
        dropout_key = key if dropout else None
        logits = network.apply(params, examples.x_t, examples.network_time, dropout_key=dropout_key)
        total = -log_prob(logits, examples.y)
        rank = rank_of(logits, examples.y)
        return total.mean(), Terms(total, (rank < 1).astype(jnp.float32), (rank < TOP).astype(jnp.float32))

    def observe(carried, examples, found):
        n = jnp.full((), len(examples.y), jnp.float32)
        reported = {"loss": found.total, "top1": found.top1, "top5": found.top5}
        sums = {name: jnp.stack([term.sum(), n]) for name, term in reported.items()}
        if noise is not None:
            sums |= by_level(noise, "top1", examples.time, found.top1)
        return None, sums

    levels = () if noise is None else names_by_level(noise, "top1")
    return Task(network.init, lambda key: None, draw, loss, observe, ("loss", "top1", "top5", *levels))


def log_prob(logits: Float[Array, "n classes"], y: Label) -> PerExample:
    """The log-softmax at the labels: log p(y | x)."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]


def rank_of(logits: Float[Array, "n classes"], y: Label) -> Array:
    """How many classes are more probable than the label, i32[n]; 0 is a hit. Of equal ones the label comes last."""
    own = jnp.take_along_axis(logits, y[:, None], axis=1)
    return (logits >= own).sum(axis=1) - 1


def moved(images: Image, offsets: Array, border: int) -> Image:
    """Cuts each image out of itself with repeated edges, at offsets i32[n, 2] within [0, 2 border]."""
    _, h, w, c = images.shape
    wide = jnp.pad(images, ((0, 0), (border, border), (border, border), (0, 0)), mode="edge")

    def cut(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (h, w, c))

    return jax.vmap(cut)(wide, offsets)
