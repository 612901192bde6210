"""Between images and what is diffused. Everything that draws, trains or scores images goes through a codec."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Image, Params, Pixels

PREFIX = "codec."
"""What the names of a codec's tensors begin with, among the parameters of a model that has one."""
MEAN, STD = f"{PREFIX}mean", f"{PREFIX}std"


class Codec(NamedTuple):
    """Two functions on the device, which compile into the step or the sampler that uses them."""

    encode: Callable[[Array], Array]  # a batch as the data cache holds it -> f32[n, h, w, c], of about unit scale
    decode: Callable[[Params, Array], Pixels]  # (the model's parameters, what is diffused) -> u8[n, height, width, 3]
    shape: tuple[int, int, int]  # (h, w, c) of what is diffused
    bounded: bool  # whether that lies in [-1, 1]
    stored: jax.ShapeDtypeStruct  # an example of what the data cache holds
    tensors: Mapping[str, jax.ShapeDtypeStruct]  # what `decode` needs of the parameters, by name


def pixels(image_size: int) -> Codec:
    """The images themselves, in [-1, 1]."""
    shape = (image_size, image_size, 3)
    return Codec(
        encode=to_signed,
        decode=lambda params, x_0: to_uint8(x_0),
        shape=shape,
        bounded=True,
        stored=jax.ShapeDtypeStruct(shape, jnp.uint8),
        tensors={},
    )


def latents(decode: Callable[[Params, Image], Image], shape: tuple[int, int, int], like: Params) -> Codec:
    """The latents of an autoencoder, of which every channel has mean 0 and variance 1 over the training set.

    The data cache holds them so, and the autoencoder's tensors are kept among the model's, since decoding needs them.

    Args:
        decode: (the autoencoder's parameters, its latents) -> images, nearly in [-1, 1].
        shape: (h, w, c) of the latents.
        like: shapes of the autoencoder's parameters.

    Returns:
        The codec. Its tensors are those of the autoencoder and, for each channel, f32[c] `MEAN` and `STD`.
    """
    channel = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)

    def decoded(params: Params, z: Image) -> Pixels:
        own = {name: params[PREFIX + name] for name in like}
        return to_uint8(decode(own, z * params[STD][None, None, None] + params[MEAN][None, None, None]))

    return Codec(
        encode=lambda z: z,
        decode=decoded,
        shape=shape,
        bounded=False,
        stored=jax.ShapeDtypeStruct(shape, jnp.float32),
        tensors={PREFIX + name: leaf for name, leaf in like.items()} | {MEAN: channel, STD: channel},
    )


def to_signed(images: Pixels) -> Image:
    """Maps grey levels linearly to [-1, 1]: x / 127.5 - 1.

    This is the project's only conversion of images from integers to floats.

    Args:
        images: u8, any shape, on the device.

    Returns:
        f32 of the same shape, in [-1, 1].

    Raises:
        ValueError: the pixels are not uint8.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"expected pixels of dtype uint8, got {images.dtype}")
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Image) -> Pixels:
    """Clips to [-1, 1], maps to [0, 255] and rounds to nearest: the inverse of `to_signed`, and the only quantiser.

    The reference truncates instead of rounding, which darkens every image by half a grey level.
    """
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
