"""Laws of the Gaussian and of the codebook; the numbers are those of test_golden_ldm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.model.bottleneck import (
    LOG_VAR_RANGE,
    Posterior,
    draw,
    kl_divergence,
    nearest_code,
    negative_log_density,
    posterior_of,
    quantize,
)

RNG = np.random.default_rng(0)


def images(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_moments_are_means_then_clamped_log_variances():
    moments = jnp.array([[[[1.0, 2.0, -100.0, 100.0]]]])
    posterior = posterior_of(moments)
    np.testing.assert_array_equal(posterior.mean[0, 0, 0], [1, 2])
    np.testing.assert_array_equal(posterior.log_var[0, 0, 0], LOG_VAR_RANGE)


def test_clamped_log_variances_get_no_gradient():
    moments = jnp.array([[[[0.5, 25.0]]], [[[0.5, -31.0]]], [[[0.5, 1.0]]]])
    gradient = jax.grad(lambda moments: kl_divergence(posterior_of(moments)).sum())(moments)
    np.testing.assert_allclose(gradient[:, 0, 0], [[0.5, 0], [0.5, 0], [0.5, (np.e - 1) / 2]], rtol=1e-6)


def test_draws_have_the_posterior_moments():
    posterior = Posterior(jnp.full((1, 1, 1, 1), 3.0), jnp.full((1, 1, 1, 1), np.log(4.0)))
    many = Posterior(*(jnp.broadcast_to(part, (1, 100, 100, 1)) for part in posterior))
    z = draw(many, images(1, 100, 100, 1))
    assert abs(z.mean() - 3) < 0.1
    assert abs(z.std() - 2) < 0.1
    np.testing.assert_array_equal(draw(posterior, jnp.zeros((1, 1, 1, 1))), posterior.mean)


def test_divergences():
    """KL(q || q) = 0; without another Gaussian it is the standard one; KL is the mean of the difference in density."""
    a, b = (Posterior(images(2, 3, 3, 2), images(2, 3, 3, 2)) for _ in range(2))
    standard = Posterior(jnp.zeros((2, 3, 3, 2)), jnp.zeros((2, 3, 3, 2)))
    np.testing.assert_allclose(kl_divergence(a, a), 0, atol=1e-5)
    np.testing.assert_allclose(kl_divergence(a), kl_divergence(a, standard), rtol=1e-5)
    a, b = (Posterior(*(jnp.broadcast_to(part[:1, :1, :1], (2000, 1, 1, 2)) for part in q)) for q in (a, b))
    z = draw(a, images(2000, 1, 1, 2))
    sampled = (negative_log_density(b, z) - negative_log_density(a, z)).mean()
    assert abs(sampled - kl_divergence(a, b)[0]) < 0.05 * kl_divergence(a, b)[0]


def test_codes_are_the_nearest():
    z, codebook = images(2, 3, 4, 5), images(7, 5)
    distances = ((np.asarray(z)[..., None, :] - np.asarray(codebook)) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(nearest_code(z, codebook), distances.argmin(axis=-1))
    quantized = quantize(z, codebook)
    np.testing.assert_allclose(quantized.z, codebook[quantized.indices], atol=1e-6)
    np.testing.assert_array_equal(nearest_code(codebook[None, None], codebook)[0, 0], np.arange(7))


@pytest.mark.parametrize("legacy", [True, False])
def test_beta_weights_one_of_two_equal_parts(legacy):
    z, codebook = images(2, 3, 4, 5), images(7, 5)
    quantized = quantize(z, codebook, beta=0.1, legacy=legacy)
    distance = ((z - codebook[quantized.indices]) ** 2).mean()
    np.testing.assert_allclose(quantized.loss, 1.1 * distance, rtol=1e-5)
    of_z = jax.grad(lambda z: quantize(z, codebook, beta=0.1, legacy=legacy).loss)(z)
    expected = 2 * (z - codebook[quantized.indices]) / z.size * (1 if legacy else 0.1)
    np.testing.assert_allclose(of_z, expected, atol=1e-7)


def test_gradients_pass_straight_through_and_leave_the_codebook_alone():
    z, codebook, R = images(1, 2, 2, 3), images(4, 3), images(1, 2, 2, 3)
    of_z, of_codebook = jax.grad(lambda *a: (quantize(*a).z * R).sum(), argnums=(0, 1))(z, codebook)
    np.testing.assert_array_equal(of_z, R)
    np.testing.assert_array_equal(of_codebook, 0)
