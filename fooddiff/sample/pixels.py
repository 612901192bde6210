"""The one quantiser: images in [-1, 1] to 8 bits."""

import jax.numpy as jnp

from fooddiff.arrays import Image, Pixels


def to_uint8(images: Image) -> Pixels:
    """Clips to [-1, 1], maps to [0, 255] and rounds to nearest.

    The reference truncates instead of rounding, which darkens every image by half a grey level.
    """
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
