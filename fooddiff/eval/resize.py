"""The resize rules that stand between an image and the Inception network, each as published code applies it.

Owns the interpolation weights. Every rule is separable and linear along an axis: output pixel i is a weighted
mean of a few input pixels, `taps`. The rules differ by up to 143 grey levels on noise, so a distance names
its rule.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fooddiff.arrays import Array, Float, Pixels

Resize = Callable[[Pixels, int], Float[Array, "n size size c"]]
"""(u8[n, h, w, c], size) -> f32[n, size, size, c] in grey levels 0..255."""


class Taps(NamedTuple):
    """Which input pixels an output pixel is made of, along one axis."""

    index: np.ndarray  # i64[size, k], positions in the input
    weight: np.ndarray  # f32[size, k], each row sums to 1


def tf1(pixels: Pixels, size: int) -> Float[Array, "n size size c"]:
    """Bilinear interpolation as TensorFlow 1 computes it: no half-pixel centres, no antialiasing.

    Output pixel i lies at input position i * (in / size) in float32. This is the rule of the original FID
    code, of torch-fidelity, of EDM's reference statistics and of torchmetrics before 1.8
    (tensorflow/core/kernels/ resize_bilinear_op.cc).

    Args:
        pixels: u8[n, h, w, c].
        size: the output's height and width in pixels.

    Returns:
        f32[n, size, size, c] in 0..255.
    """
    return _apply(pixels, size, _tf1_taps)


def half_pixel(pixels: Pixels, size: int) -> Float[Array, "n size size c"]:
    """Antialiased bilinear interpolation with half-pixel centres: the default of torchmetrics since 1.8.

    Args:
        pixels: u8[n, h, w, c].
        size: the output's height and width in pixels.

    Returns:
        f32[n, size, size, c] in 0..255.
    """
    return _apply(pixels, size, lambda n_in, n_out: _centred_taps(n_in, n_out, _triangle, 1.0))


def clean_bicubic(pixels: Pixels, size: int) -> Float[Array, "n size size c"]:
    """Antialiased bicubic interpolation (a = -1/2) in float, clipped to 0..255: clean-fid's "clean" mode.

    Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation": Pillow's filter on
    float images, never rounded to 8 bits.

    Args:
        pixels: u8[n, h, w, c].
        size: the output's height and width in pixels.

    Returns:
        f32[n, size, size, c] in 0..255.
    """
    return jnp.clip(_apply(pixels, size, lambda n_in, n_out: _centred_taps(n_in, n_out, _cubic, 2.0)), 0, 255)


def _apply(pixels: Pixels, size: int, taps_of: Callable[[int, int], Taps]) -> Array:
    x = jnp.asarray(pixels).astype(jnp.float32)
    x = _resample(x, taps_of(x.shape[2], size), axis=2)
    return _resample(x, taps_of(x.shape[1], size), axis=1)


def _resample(x: Array, taps: Taps, axis: int) -> Array:
    """Written as x_0 + sum_k w_k (x_k - x_0): with two taps this is TensorFlow's own order of operations."""
    shape = [1] * x.ndim
    shape[axis] = -1
    first = jnp.take(x, taps.index[:, 0], axis=axis)
    out = first
    for k in range(1, taps.index.shape[1]):
        out = out + (jnp.take(x, taps.index[:, k], axis=axis) - first) * taps.weight[:, k].reshape(shape)
    return out


def _tf1_taps(n_in: int, n_out: int) -> Taps:
    position = np.arange(n_out, dtype=np.float32) * np.float32(n_in / n_out)
    low = position.astype(np.int64)
    high = np.minimum(low + 1, n_in - 1)
    fraction = position - low.astype(np.float32)
    return Taps(np.stack([low, high], 1), np.stack([1 - fraction, fraction], 1))


def _centred_taps(n_in: int, n_out: int, kernel: Callable[[np.ndarray], np.ndarray], support: float) -> Taps:
    """Half-pixel centres; to shrink, the kernel is stretched by in / out, which low-passes (Pillow)."""
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    centre = (np.arange(n_out)[:, None] + 0.5) * scale
    start = np.floor(centre - support * stretch + 0.5).astype(np.int64)
    index = start + np.arange(int(np.ceil(2 * support * stretch)) + 1)[None]
    inside = (index >= 0) & (index < n_in)
    weight = np.where(inside, kernel((index + 0.5 - centre) / stretch), 0.0)
    weight /= weight.sum(axis=1, keepdims=True)
    return Taps(np.clip(index, 0, n_in - 1), weight.astype(np.float32))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
