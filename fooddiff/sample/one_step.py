"""What a model sees of real images at some levels of noise, and what it makes of them in one step."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fooddiff import parallel
from fooddiff.arrays import Array, Cond, Image, Int, Key, Label, Params, Pixels, UInt8
from fooddiff.codec import Codec
from fooddiff.diffusion.denoiser import Denoiser
from fooddiff.diffusion.level import Level, add_noise
from fooddiff.keys import stream
from fooddiff.xla import jit

LOG_SNRS = (-6.0, -3.0, 0.0, 3.0, 6.0)

OneStep: TypeAlias = Callable[[Params, Key, Pixels | Image, Label], UInt8[Array, "levels rows h w c"]]
"""The compiled function: (params, key, images as the data cache holds them, labels i32[n]) -> for each level the real,
the noisy and the predicted image of the first example, then of the second, and so on. An example has the same noise at
all levels. Where latents are diffused, all three are decoded: the real one is what the autoencoder leaves of it."""


def make_one_step(
    denoiser: Callable[[Params], Denoiser],
    levels: Level,
    codec: Codec,
    *,
    cond: Callable[[Key, Int[Array, "n 2"], Image], Cond],
    mesh: jax.sharding.Mesh,
) -> OneStep:
    """Compiles the prediction of x_0 at some levels.

    Args:
        denoiser: parameters -> the denoiser.
        levels: fields of shape [levels].
        codec: between what is diffused and pixels.
        cond: (key, (class, row) of each image, the images as they are diffused) -> what the denoiser is told of them.
        mesh: devices.

    Returns:
        The compiled function.
    """

    @partial(jit, out_shardings=parallel.replicated(mesh))
    def one_step(params, key, stored, y):
        x_0 = codec.encode(stored)
        eps = jax.random.normal(stream(key, "one step"), x_0.shape)
        denoise = denoiser(params)
        given = cond(key, jnp.stack([y, jnp.arange(len(y))], axis=1), x_0)

        def at(level):
            level = jax.tree.map(lambda number: jnp.full((len(x_0),), number), level)
            x_t = add_noise(level, x_0, eps)
            return codec.decode(params, x_t), codec.decode(params, denoise(x_t, level, given).x_0)

        noisy, predicted = jax.lax.map(at, levels)
        shown = jnp.stack([jnp.broadcast_to(codec.decode(params, x_0), noisy.shape), noisy, predicted], axis=2)
        return shown.reshape(len(noisy), -1, *shown.shape[3:])

    return one_step


def captions(levels: Level) -> list[str]:
    """The name of each level for a grid."""
    return [f"log SNR_{log_snr:.1f}" for log_snr in np.asarray(levels.log_snr)]
