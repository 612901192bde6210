import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.continuous import level_of
from fooddiff.diffusion.denoiser import Prediction
from fooddiff.diffusion.guidance import guided, unconditional
from fooddiff.diffusion.level import eps_from_x0


@pytest.fixture
def x_t():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 3, 2)), jnp.float32)


def level(log_snr=0.5):
    return level_of(jnp.full(4, log_snr))


def constant(factor, log_var=None):
    """Predicts a multiple of x_t."""

    def denoise(x_t, level, cond):
        x_0 = factor * x_t
        return Prediction(x_0, eps_from_x0(level, x_0, x_t), log_var)

    return denoise


@pytest.mark.parametrize(("scale", "factor"), [(0.0, 0.2), (1.0, 0.5), (3.0, 1.1)])
def test_the_scale_leads_from_the_guide_through_the_denoiser(x_t, scale, factor):
    prediction = guided(constant(0.5, jnp.float32(7)), constant(0.2), scale=scale)(x_t, level(), {})
    np.testing.assert_allclose(prediction.x_0, factor * x_t, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(prediction.eps, eps_from_x0(level(), prediction.x_0, x_t), rtol=1e-5)
    assert prediction.log_var == 7


@pytest.mark.parametrize(("log_snr", "inside"), [(-5.0, False), (-4.0, True), (0.0, True), (4.0, True), (4.1, False)])
def test_the_guide_is_called_within_the_interval_only(x_t, log_snr, inside):
    calls = []

    def guide(*inputs):
        jax.debug.callback(lambda: calls.append(1))
        return constant(0.2)(*inputs)

    denoise = jax.jit(guided(constant(0.5), guide, scale=3.0, interval=(-4.0, 4.0)))
    prediction = denoise(x_t, level(log_snr), {})
    jax.effects_barrier()
    assert bool(calls) == inside
    np.testing.assert_allclose(prediction.x_0, (1.1 if inside else 0.5) * x_t, rtol=1e-5, atol=1e-6)


def test_rescaling_brings_the_deviation_back(x_t):
    plain = guided(constant(0.5), constant(0.2), scale=3.0)(x_t, level(), {}).x_0
    half, whole = (
        guided(constant(0.5), constant(0.2), scale=3.0, rescale=share)(x_t, level(), {}).x_0 for share in (0.5, 1.0)
    )
    np.testing.assert_allclose(whole.std((1, 2, 3)), (0.5 * x_t).std((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(half, (plain + whole) / 2, rtol=1e-5, atol=1e-6)


def test_the_unconditional_denoiser_sees_the_null_label_and_all_else(x_t):
    seen = {}

    def denoise(x_t, level, cond):
        seen.update(cond)
        return constant(0.5)(x_t, level, cond)

    low_res = jnp.zeros((4, 1, 1, 2))
    unconditional(denoise, 101)(x_t, level(), {"y": jnp.arange(4), "low_res": low_res})
    np.testing.assert_array_equal(seen["y"], [101] * 4)
    assert seen["low_res"] is low_res
