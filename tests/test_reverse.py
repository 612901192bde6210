import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.process import at, make_process, q_posterior, q_sample, x0_from_eps
from fooddiff.diffusion.reverse import (
    Parameterization,
    eps_target,
    fixed_large,
    fixed_small,
    learned_range,
    reverse_gaussian,
    split_output,
    x0_as_predicted,
    x0_target,
)
from fooddiff.diffusion.schedule import cosine_betas

PROCESS = make_process(cosine_betas(50))
T = jnp.array([0, 1, 25, 45])
EPS = Parameterization(x0_from_eps, eps_target, fixed_small)
X_0 = Parameterization(x0_as_predicted, x0_target, fixed_small)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    x_0, eps = rng.uniform(-1, 1, (4, 3, 3, 2)), rng.normal(size=(4, 3, 3, 2))
    return jnp.asarray(x_0, jnp.float32), jnp.asarray(eps, jnp.float32)


@pytest.mark.parametrize("param", [EPS, X_0])
def test_the_right_prediction_gives_the_posterior(images, param):
    x_0, eps = images
    x_t = q_sample(PROCESS, x_0, T, eps)
    step = reverse_gaussian(PROCESS, param, param.target(x_0, eps), x_t, T, clip=False)
    posterior = q_posterior(PROCESS, x_0, x_t, T)
    np.testing.assert_allclose(step.x_0, x_0, atol=1e-4)
    np.testing.assert_allclose(step.mean, posterior.mean, atol=1e-4)
    np.testing.assert_array_equal(step.log_var, posterior.log_var)


def test_clip_bounds_x0_and_the_mean_follows(images):
    x_0, eps = images
    x_t = q_sample(PROCESS, x_0, T, eps)
    wild = 3 * eps
    free, clipped = (reverse_gaussian(PROCESS, EPS, wild, x_t, T, clip=clip) for clip in (False, True))
    assert jnp.abs(free.x_0).max() > 1
    np.testing.assert_array_equal(clipped.x_0, jnp.clip(free.x_0, -1, 1))
    np.testing.assert_array_equal(clipped.mean, q_posterior(PROCESS, clipped.x_0, x_t, T).mean)


def test_learned_range_interpolates_in_the_log_and_goes_beyond(images):
    low, high = at(PROCESS.posterior_log_var, T), at(PROCESS.log_beta, T)
    v = jnp.ones((4, 2, 2, 3))
    for value, expected in [(-1, low), (1, high), (0, (low + high) / 2), (3, 2 * high - low)]:
        np.testing.assert_allclose(learned_range(PROCESS, value * v, T), jnp.broadcast_to(expected, v.shape), rtol=1e-6)


def test_fixed_variances_bracket_the_true_one():
    empty = jnp.zeros((4, 2, 2, 0))
    small, large = fixed_small(PROCESS, empty, T), fixed_large(PROCESS, empty, T)
    np.testing.assert_array_equal(small, at(PROCESS.posterior_log_var, T))
    np.testing.assert_array_equal(large[1:], at(PROCESS.log_beta, T)[1:])
    assert (large >= small).all()
    assert large[0] == small[0] == PROCESS.posterior_log_var[1]


@pytest.mark.parametrize("variance_channels", [0, 2])
def test_split_output(images, variance_channels):
    x_t, _ = images
    out = jnp.concatenate([x_t, 5 + x_t[..., :variance_channels]], axis=-1)
    prediction, v = split_output(out, x_t)
    np.testing.assert_array_equal(prediction, x_t)
    assert v.shape == (4, 3, 3, variance_channels)
    assert (v > 3).all()
