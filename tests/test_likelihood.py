import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.denoiser import (
    clipped,
    eps_error,
    fixed_small,
    learned_range,
    make_denoiser,
    read_eps,
    read_x0,
)
from fooddiff.diffusion.discrete import level_at, make_process, transition_at, transitions
from fooddiff.diffusion.likelihood import bits_per_dim
from fooddiff.diffusion.losses import prior_term, vlb_loss
from fooddiff.diffusion.schedule import cosine_betas

PROCESS = make_process(cosine_betas(12))
STEPS = transitions(PROCESS)


@pytest.fixture
def draws():
    rng = np.random.default_rng(0)
    x_0 = (rng.integers(0, 256, (2, 3, 3, 1)) / 127.5 - 1).astype(np.float32)
    noises = jnp.asarray(rng.normal(size=(12, *x_0.shape)), jnp.float32)
    return x_0, noises


def test_the_bound_is_what_vlb_training_estimates(draws):
    """The mean of L_vlb over uniform t is the sum of the terms."""
    x_0, noises = draws

    def apply(x_t, t, cond):
        return jnp.concatenate([0.6 * x_t + cond["y"][:, None, None, None], jnp.sin(x_t)], axis=-1)

    denoise, cond = make_denoiser(apply, read_eps, learned_range), {"y": jnp.array([0.1, -0.2])}
    bound = bits_per_dim(denoise, STEPS, x_0, lambda t: noises[t], cond)
    terms = [
        vlb_loss(eps_error, denoise, x_0, transition_at(PROCESS, jnp.full(2, t)), noises[t], cond, num_timesteps=12)
        for t in range(12)
    ]
    np.testing.assert_allclose(bound.vb, np.stack([term.vb for term in terms], axis=1), rtol=1e-4)
    np.testing.assert_allclose(bound.total - bound.prior, np.mean([term.total for term in terms], axis=0), rtol=1e-4)
    np.testing.assert_allclose(bound.eps_mse, np.stack([term.mse for term in terms], axis=1), rtol=1e-3)


def test_knowing_x0_leaves_the_prior_and_the_last_step(draws):
    x_0, noises = draws
    denoise = clipped(make_denoiser(lambda *_: x_0, read_x0, fixed_small))
    bound = bits_per_dim(denoise, STEPS, x_0, lambda t: noises[t], {})
    np.testing.assert_allclose(bound.vb[:, 1:], 0, atol=1e-5)
    np.testing.assert_array_equal(bound.x0_mse, 0)
    np.testing.assert_allclose(bound.eps_mse, 0, atol=1e-6)
    np.testing.assert_allclose(bound.prior, prior_term(x_0, level_at(PROCESS, jnp.full(2, 11))))
    np.testing.assert_allclose(bound.total, bound.prior + bound.vb[:, 0], atol=1e-4)


def test_clipping_is_a_choice(draws):
    x_0, noises = draws
    denoise = make_denoiser(lambda *_: x_0 + 2, read_x0, fixed_small)
    free, within = (bits_per_dim(each, STEPS, x_0, lambda t: noises[t], {}) for each in (denoise, clipped(denoise)))
    np.testing.assert_allclose(free.x0_mse, 4, rtol=1e-5)
    assert (within.x0_mse < 4).all()
    assert (within.total < free.total).all()
