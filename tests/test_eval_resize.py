import functools

import jax
import numpy as np
import pytest
from PIL import Image

from fooddiff.eval import resize

RULES = [resize.tf1, resize.half_pixel, resize.clean_bicubic]
SHAPES = [(64, 64), (8, 8), (1, 1), (40, 73), (299, 299), (400, 330)]


def pixels(height, width, n=2):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def resized(rule, x, size=299):
    return np.asarray(jax.jit(functools.partial(rule, size=size))(x))


def tf1_by_definition(x, size):
    """TensorFlow 1's rule, one output pixel at a time along an axis."""
    x = x.astype(np.float32)
    for axis in (2, 1):
        n_in = x.shape[axis]
        rows = []
        for i in range(size):
            position = np.float32(i) * np.float32(n_in / size)
            low = int(position)
            a, b = np.take(x, low, axis), np.take(x, min(low + 1, n_in - 1), axis)
            rows.append(a + (b - a) * np.float32(position - np.float32(low)))
        x = np.stack(rows, axis)
    return x


def pillow(x, size, kernel):
    def channel(plane):
        return np.asarray(Image.fromarray(plane.astype(np.float32)).resize((size, size), kernel))

    return np.stack([np.stack([channel(image[..., c]) for c in range(3)], -1) for image in x])


@pytest.mark.parametrize("shape", SHAPES)
def test_tf1_is_tensorflows_rule(shape):
    x = pixels(*shape)
    np.testing.assert_allclose(resized(resize.tf1, x), tf1_by_definition(x, 299), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_half_pixel_is_antialiased_bilinear(shape):
    x = pixels(*shape)
    expected = pillow(x, 299, Image.Resampling.BILINEAR)
    np.testing.assert_allclose(resized(resize.half_pixel, x), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_bicubic_is_pillows_float_bicubic_clipped(shape):
    x = pixels(*shape)
    expected = pillow(x, 299, Image.Resampling.BICUBIC).clip(0, 255)
    np.testing.assert_allclose(resized(resize.clean_bicubic, x), expected, rtol=0, atol=2e-4)


def test_bicubic_overshoot_is_clipped():
    x = pixels(16, 16)
    out = resized(resize.clean_bicubic, x)
    assert out.min() == 0
    assert out.max() == 255
    assert pillow(x, 299, Image.Resampling.BICUBIC).max() > 256


@pytest.mark.parametrize("rule", RULES)
def test_a_constant_image_stays_exactly_constant(rule):
    x = np.full((1, 20, 30, 3), 77, np.uint8)
    assert set(resized(rule, x).ravel()) == {77.0}


@pytest.mark.parametrize("rule", RULES)
def test_the_same_size_passes_through(rule):
    x = pixels(12, 12)
    np.testing.assert_array_equal(resized(rule, x, 12), x.astype(np.float32))


def test_rules_differ_where_published_figures_do():
    x = pixels(64, 64)
    tf1, half = resized(resize.tf1, x), resized(resize.half_pixel, x)
    assert np.abs(tf1 - half).max() > 50


def test_only_half_pixel_centres_commute_with_a_flip():
    x = pixels(32, 32)
    flipped = resized(resize.half_pixel, x[:, :, ::-1])[:, :, ::-1]
    np.testing.assert_allclose(flipped, resized(resize.half_pixel, x), atol=1e-3)
    tf1_flipped = resized(resize.tf1, x[:, :, ::-1])[:, :, ::-1]
    assert np.abs(tf1_flipped - resized(resize.tf1, x)).max() > 50
