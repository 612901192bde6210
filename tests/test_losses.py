import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.continuous import level_of
from fooddiff.diffusion.denoiser import (
    eps_error,
    fixed_small,
    learned_range,
    make_denoiser,
    read_eps,
    read_x0,
    x0_error,
)
from fooddiff.diffusion.discrete import level_at, make_process, make_tables, transition_at
from fooddiff.diffusion.level import add_noise
from fooddiff.diffusion.losses import (
    _tanh,
    bound_term,
    hybrid_loss,
    mse_loss,
    prior_term,
    vlb_loss,
    weighted_loss,
)
from fooddiff.diffusion.schedule import cosine_betas

PROCESS = make_process(cosine_betas(40))
T = jnp.array([0, 1, 20, 39])
HERE = transition_at(PROCESS, T)


def learned(out):
    """A denoiser that predicts eps and the variance and always says the same."""
    return make_denoiser(lambda *_: out, read_eps, learned_range)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    x_0 = (rng.integers(0, 256, (4, 3, 3, 2)) / 127.5 - 1).astype(np.float32)
    eps = rng.normal(size=x_0.shape).astype(np.float32)
    out = rng.normal(size=(4, 3, 3, 4)).astype(np.float32)
    return x_0, eps, out


def gradient(batch, loss, field):
    """Gradient of one field of the loss terms with respect to the network's output, by (prediction, variance)."""
    x_0, eps, out = batch

    def total(out):
        return getattr(loss(learned(out), x_0, HERE, eps, {}), field).sum()

    return jnp.split(jax.grad(total)(out), 2, axis=-1)


simple = partial(mse_loss, eps_error)
hybrid = partial(hybrid_loss, eps_error, vb_weight=0.3)
vlb = partial(vlb_loss, eps_error, num_timesteps=40)


def test_hybrid_bound_trains_the_variance_only(batch):
    mean, variance = gradient(batch, hybrid, "vb")
    assert (mean == 0).all()
    assert (variance != 0).mean() > 0.9


def test_hybrid_mse_trains_the_prediction_only(batch):
    mean, variance = gradient(batch, hybrid, "mse")
    assert (mean != 0).all()
    assert (variance == 0).all()
    np.testing.assert_array_equal(gradient(batch, hybrid, "total")[0], mean)


def test_vlb_trains_both(batch):
    mean, variance = gradient(batch, vlb, "total")
    assert (mean[1:] != 0).any()
    assert (variance[1:] != 0).any()


@pytest.mark.parametrize(("loss", "field"), [(simple, "vb"), (vlb, "mse")])
def test_what_is_only_reported_has_no_gradient(batch, loss, field):
    assert all((part == 0).all() for part in gradient(batch, loss, field))


def test_totals_are_made_of_the_terms(batch):
    x_0, eps, out = batch
    arguments = (learned(out), x_0, HERE, eps, {})
    mse, hybrid_terms, bound = simple(*arguments), hybrid(*arguments), vlb(*arguments)
    np.testing.assert_array_equal(mse.total, mse.mse)
    np.testing.assert_allclose(hybrid_terms.total, hybrid_terms.mse + 0.3 * hybrid_terms.vb, rtol=1e-6)
    np.testing.assert_allclose(bound.total, 40 * bound.vb, rtol=1e-6)
    for terms in (hybrid_terms, bound):
        np.testing.assert_allclose(terms.mse, mse.mse, rtol=1e-6)
        np.testing.assert_allclose(terms.vb, mse.vb, rtol=1e-6)


def test_the_denoiser_sees_xt_its_level_and_the_conditions(batch):
    x_0, eps, out = batch
    seen = []

    def denoise(*arguments):
        seen.extend(arguments)
        return learned(out)(*arguments)

    cond = {"y": jnp.arange(4)}
    hybrid(denoise, x_0, HERE, eps, cond)
    np.testing.assert_array_equal(seen[0], add_noise(HERE.level, x_0, eps))
    assert seen[1] is HERE.level
    assert seen[2] is cond


def test_the_weighted_loss_is_the_squared_error_of_x0_times_the_weight(batch):
    x_0, eps, out = batch
    level = level_of(jnp.array([-15.0, -1.0, 1.0, 15.0]))
    denoise = make_denoiser(lambda *_: out[..., :2], read_x0)
    terms = weighted_loss(lambda log_snr: 3 + log_snr, denoise, x_0, level, eps, {})
    mse = ((x_0 - out[..., :2]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(terms.x0_mse, mse, rtol=1e-6)
    np.testing.assert_allclose(terms.total, (3 + np.array([-15.0, -1.0, 1.0, 15.0])) * mse, rtol=1e-5)


def test_a_perfect_model_has_no_divergence(batch):
    x_0, eps, _ = batch
    for read, error, out in [(read_eps, eps_error, eps), (read_x0, x0_error, x_0)]:
        terms = mse_loss(error, make_denoiser(lambda *_, out=out: out, read, fixed_small), x_0, HERE, eps, {})
        np.testing.assert_array_equal(terms.mse, 0)
        np.testing.assert_allclose(terms.vb[1:], 0, atol=1e-5)
        assert terms.vb[0] > 0


def test_a_divergence_is_not_negative(batch):
    x_0, eps, out = batch
    for scale in (0.1, 1.0, 3.0):
        vb = vlb(learned(scale * out), x_0, HERE, eps, {}).vb
        assert (vb > -1e-6).all()


@pytest.mark.parametrize("mean", [-1.3, -0.6, 0.0, 0.31, 0.999])
@pytest.mark.parametrize("v", [-1.0, 8.0])
def test_decoder_is_a_distribution_over_the_256_values(mean, v):
    """At t = 0 the term is the code length of a pixel, so 2^-bits sums to 1; 256 images of one pixel."""
    x_0 = jnp.linspace(-1, 1, 256)[:, None, None, None]
    out = jnp.stack([jnp.full(256, mean), jnp.full(256, v)], axis=-1)[:, None, None]
    first = transition_at(PROCESS, jnp.zeros(256, jnp.int32))
    prediction = make_denoiser(lambda *_: out, read_x0, learned_range)(x_0, first.level, {})
    bits = bound_term(prediction, x_0, x_0, first)
    np.testing.assert_allclose((2.0**-bits).sum(), 1, atol=1e-4)


def test_prior_term_is_the_divergence_from_a_standard_normal(batch):
    x_0, _, _ = batch
    betas = np.full(5, 0.2)
    last = make_tables(betas).sqrt_alpha_bar[-1] ** 2
    nats = 0.5 * (last * x_0.astype(np.float64) ** 2 - last - np.log(1 - last))
    expected = nats.mean(axis=(1, 2, 3)) / math.log(2)
    np.testing.assert_allclose(prior_term(x_0, level_at(make_process(betas), jnp.full(4, 4))), expected, rtol=1e-5)


def test_tanh_is_rounded_right_where_it_saturates():
    x = np.concatenate([np.linspace(-30, -2, 20_001), np.linspace(2, 30, 20_001)]).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    half_a_unit = 2.0**-25
    assert np.abs(np.asarray(_tanh(x), np.float64) - exact).max() < 1.2 * half_a_unit
    slope = jax.vmap(jax.grad(_tanh))(jnp.array([-100.0, -1.0, 0.0, 1.0, 100.0]))
    np.testing.assert_allclose(slope, [0, 0.41997434, 1, 0.41997434, 0], atol=1e-6)
