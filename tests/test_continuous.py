from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion import continuous
from fooddiff.diffusion.continuous import cosine_log_snr, level_of, linear_log_snr, transitions


def test_levels_are_right_to_float32_wherever_training_goes():
    log_snr = np.linspace(-15, 15, 61)
    level = level_of(jnp.asarray(log_snr, jnp.float32))
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))
    for found, exact in zip(level[:4], (alpha, sigma, 1 / alpha, sigma / alpha), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-6)
    np.testing.assert_array_equal(level.network_time, level.log_snr)


@pytest.mark.parametrize("log_snrs", [np.linspace(-9, 9, 20), np.array([-3.0, 1.0, 1.5])])
def test_the_posterior_is_bayes(log_snrs):
    """Of x_next given x_t and x_0, from q(x_next | x_0) and q(x_t | x_next)."""
    steps = transitions(log_snrs)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-log_snrs))), np.sqrt(1 / (1 + np.exp(log_snrs)))
    ratio = alpha[:-1] / alpha[1:]  # of x_t = ratio x_next + noise
    step_var = sigma[:-1] ** 2 - ratio**2 * sigma[1:] ** 2
    precision = ratio**2 / step_var + 1 / sigma[1:] ** 2
    np.testing.assert_allclose(np.exp(steps.posterior_log_var[:-1]), 1 / precision, rtol=1e-5)
    np.testing.assert_allclose(steps.posterior_coef_xt[:-1], ratio / step_var / precision, rtol=1e-5)
    np.testing.assert_allclose(steps.posterior_coef_x0[:-1], alpha[1:] / sigma[1:] ** 2 / precision, rtol=1e-5)


def test_the_last_step_leads_to_the_image():
    steps = transitions(np.linspace(-9, 9, 5))
    assert (steps.posterior_coef_x0[-1], steps.posterior_coef_xt[-1]) == (1, 0)
    assert np.exp(steps.posterior_log_var[-1]) < 1e-15
    assert (steps.next.alpha[-1], steps.next.sigma[-1], steps.next.log_snr[-1]) == (1, 0, np.inf)
    np.testing.assert_array_equal(steps.next.log_snr[:-1], steps.level.log_snr[1:])
    np.testing.assert_array_equal(steps.remaining, [4, 3, 2, 1, 0])


@pytest.mark.parametrize("log_snr_of", [cosine_log_snr, linear_log_snr])
def test_schedules_fall_from_little_noise_to_noise_alone(log_snr_of):
    log_snr = log_snr_of(jnp.linspace(0, 1, 101))
    assert (np.diff(log_snr) <= 0).all()
    np.testing.assert_allclose([log_snr[0], log_snr[50], log_snr[-1]], [15, 0, -15], atol=1e-5)


def test_the_cosine_schedule_is_alpha_as_a_cosine():
    u = jnp.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(level_of(cosine_log_snr(u)).alpha, np.cos(np.pi / 2 * u), rtol=1e-5)


def time_of(log_snr):
    """The inverse of the linear schedule."""
    return (1 - np.asarray(log_snr) / continuous.MAX_LOG_SNR) / 2


def test_a_stratified_batch_has_one_time_in_each_stratum():
    u = time_of(continuous.stratified(jax.random.key(0), 64, log_snr_of=linear_log_snr))
    np.testing.assert_array_equal(np.floor(u * 64), np.arange(64))
    assert np.std(u * 64 - np.arange(64)) > 0.2


def test_densities_are_what_they_say():
    """Of 40,000 draws: means and deviations of the time, of its logit, of the logarithm of noise to signal."""
    keys, n = jax.random.split(jax.random.key(1), 3), 40_000
    u = time_of(continuous.uniform(keys[0], n, log_snr_of=linear_log_snr))
    np.testing.assert_allclose([u.mean(), u.std()], [0.5, 12**-0.5], atol=0.01)
    u = time_of(continuous.logit_normal(keys[1], n, log_snr_of=linear_log_snr, mean=0.5, std=0.8)).astype(np.float64)
    logit = np.log(u / (1 - u))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0.5, 0.8], atol=0.02)
    log_sigma = -continuous.log_sigma_normal(keys[2], n, log_snr_of=linear_log_snr) / 2
    np.testing.assert_allclose([log_sigma.mean(), log_sigma.std()], [-1.2, 1.2], atol=0.02)


@pytest.mark.parametrize("grid", [continuous.even_in_time, continuous.even_in_log_snr, continuous.karras])
@pytest.mark.parametrize("steps", [2, 50])
def test_grids_ascend_within_their_range(grid, steps):
    log_snrs = grid(steps, -9.0, 9.0, log_snr_of=cosine_log_snr)
    assert log_snrs.shape == (steps,)
    assert (np.diff(log_snrs) > 0).all()
    assert log_snrs[0] >= -9 - 1e-9
    assert log_snrs[-1] <= 9 + 1e-9


def test_grids_are_even_in_what_they_say():
    grids = continuous.even_in_log_snr, continuous.karras, continuous.even_in_time
    even, karras, in_time = (partial(grid, log_snr_of=linear_log_snr)(10, -6.0, 6.0) for grid in grids)
    np.testing.assert_allclose(np.diff(even), 1.2, rtol=1e-6)
    np.testing.assert_allclose(np.diff(np.exp(-karras / 14)), np.diff(np.exp(-karras / 14))[0], rtol=1e-6)
    np.testing.assert_allclose([karras[0], karras[-1]], [-6, 6])
    np.testing.assert_allclose([even[0], in_time[0]], [-6, -6])  # sampling begins with noise
    np.testing.assert_allclose(np.diff(in_time[3:7]), 30 / 10, rtol=1e-5)
