"""Between images and what is diffused. Everything that draws, trains or scores images goes through a codec."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from fooddiff.arrays import Array, Image, Pixels


class Codec(NamedTuple):
    """Two functions on the device, which compile into the step or the sampler that uses them."""

    encode: Callable[[Pixels], Array]  # u8[n, height, width, 3] -> f32[n, h, w, c], of about unit scale
    decode: Callable[[Array], Pixels]
    shape: tuple[int, int, int]  # (h, w, c) of what is diffused


def pixels(image_size: int) -> Codec:
    """The images themselves, in [-1, 1]."""
    return Codec(to_signed, to_uint8, (image_size, image_size, 3))


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
