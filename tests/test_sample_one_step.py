"""Predictions in one step: what is shown of real images, in discrete and in continuous time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import build, codec, parallel
from fooddiff.diffusion.continuous import level_of
from fooddiff.diffusion.denoiser import Prediction
from fooddiff.sample.one_step import LOG_SNRS, captions, make_one_step
from tests import tiny
from tests.test_recipes import continuous

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


def test_rows_are_the_image_the_noisy_one_and_the_prediction():
    """A denoiser that says c x_t, given the class of each image."""
    seen = {}

    def denoise(x_t, level, cond):
        seen.update(cond)
        return Prediction(0.5 * x_t, x_t, None)

    levels = level_of(jnp.array([-20.0, 0.0, 20.0]))
    one_step = make_one_step(
        lambda params: denoise,
        levels,
        codec.pixels(8),
        cond=lambda key, ids, x_0: {"y": ids[:, 0]},
        mesh=parallel.make_mesh(),
    )
    shown = np.asarray(one_step({}, jax.random.key(0), PIXELS, np.array([3, 1], np.int32)))
    assert shown.shape == (3, 6, 8, 8, 3)
    for column in shown:
        np.testing.assert_array_equal(column[[0, 3]], PIXELS)
    np.testing.assert_array_equal(shown[2, [1, 4]], PIXELS)  # without noise
    assert np.abs(shown[2, 2] - (127.5 + (PIXELS[0] - 127.5) / 2)).max() <= 1
    assert (shown[0, 1] != shown[0, 4]).any()
    assert seen["y"].shape == (2,)
    assert captions(levels) == ["log SNR_-20.0", "log SNR_0.0", "log SNR_20.0"]


@pytest.mark.parametrize("make", [pytest.param(continuous, marks=pytest.mark.slow), tiny.config])
def test_levels_are_the_nearest_that_a_process_has(tmp_path, make):
    model = build.make_diffusion_model(make(tmp_path))
    one_step, names = build.make_one_step(model, parallel.make_mesh())
    assert len(names) == len(LOG_SNRS)
    if model.process is None:
        assert names == [f"log SNR_{log_snr}" for log_snr in LOG_SNRS]
    else:
        known = {f"log SNR_{log_snr:.1f}" for log_snr in np.asarray(model.process.log_snr)}
        assert set(names) <= known
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), build.abstract_params(model.network))
    shown = one_step(params, jax.random.key(0), PIXELS, np.array([3, 1], np.int32))
    assert shown.shape == (5, 6, 8, 8, 3)
