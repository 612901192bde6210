"""Super-resolution as a way to draw: sample (class, i) enlarges a real image, or what another model has drawn."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from fooddiff.arrays import Array, Int, Key, Params, Pixels
from fooddiff.codec import to_signed, to_uint8
from fooddiff.keys import stream
from fooddiff.low_res import shrink
from fooddiff.sample.generate import Draw

Enlarge: TypeAlias = Callable[[Params, Key, Int[Array, "n 2"], Pixels], Pixels]
"""The compiled sampler of a model for super-resolution: (params, key, ids, images) -> uint8[n, h, w, 3]. The images are
as large as its condition, or larger, in which case it is shown small versions of them."""


def of_real(enlarge: Enlarge, images: Pixels, labels: np.ndarray) -> Draw:
    """Enlarges a small version of a real image: sample (class, i) that of the class's image i; see `rows_of`."""

    def draw(params: Params, key: Key, ids: np.ndarray) -> Pixels:
        return enlarge(params, key, ids, np.asarray(images)[rows_of(labels, ids)])

    return draw


def rows_of(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where the image i of a class is, for ids (class, i) i32[n, 2]; after its last image a class begins again.

    Raises:
        ValueError: a class has no image.
    """
    rows = {y: np.flatnonzero(labels == y) for y in np.unique(ids[:, 0]).tolist()}
    if empty := [y for y, found in rows.items() if not len(found)]:
        raise ValueError(f"the data have no image of class {empty[0]} that could be enlarged")
    return np.array([rows[y][i % len(rows[y])] for y, i in ids.tolist()])


class CascadeParams(NamedTuple):
    """The parameters of a cascade."""

    base: Params
    upsampler: Params


def cascade(base: Draw, enlarge: Enlarge) -> Draw:
    """Enlarges what another model draws. Its parameters are `CascadeParams`; both models get noise of their own."""

    def draw(params: CascadeParams, key: Key, ids: np.ndarray) -> Pixels:
        return enlarge(params.upsampler, stream(key, "upsample"), ids, base(params.base, key, ids))

    return draw


def bicubic(images: Pixels, size: int) -> Pixels:
    """Shrinks images to a size and enlarges them again with Keys' cubic (a = -1/2): what a model is to surpass."""
    small = shrink(to_signed(images), size)
    return to_uint8(jax.image.resize(small, images.shape, "cubic", antialias=False))
