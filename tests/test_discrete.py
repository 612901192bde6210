import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fooddiff.diffusion.discrete import level_at, make_process, make_tables, transition_at, transitions
from fooddiff.diffusion.level import add_noise, clean_level, eps_from_x0, q_posterior, x0_from_eps
from fooddiff.diffusion.schedule import cosine_betas, linear_betas


@st.composite
def betas(draw):
    return draw(st.sampled_from([linear_betas, cosine_betas]))(draw(st.integers(21, 400)))


@st.composite
def processes(draw):
    """Betas and which timesteps to keep."""
    original = draw(betas())
    steps = st.sets(st.integers(0, len(original) - 1), min_size=2)
    return original, draw(st.none() | steps.map(sorted))


@given(processes())
def test_beta_belongs_to_alpha_bar(process):
    tables = make_tables(*process)
    alpha_bar = tables.sqrt_alpha_bar**2
    beta = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    np.testing.assert_allclose(np.exp(tables.log_beta), beta, rtol=1e-9)
    np.testing.assert_allclose(np.exp(tables.log_snr), alpha_bar / (1 - alpha_bar), rtol=1e-9)


@given(processes())
def test_marginal_is_the_composition_of_steps(process):
    """x_t = (1 - beta)^1/2 x_{t-1} + beta^1/2 z, from x_0 = 1 without variance."""
    tables = make_tables(*process)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(np.exp(tables.log_beta)):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        np.testing.assert_allclose(tables.sqrt_alpha_bar[t], mean, rtol=1e-9)
        np.testing.assert_allclose(tables.sqrt_one_minus_alpha_bar[t] ** 2, variance, rtol=1e-9)


@given(processes(), st.floats(-1, 1), st.floats(-3, 3))
def test_posterior_is_bayes(process, x_0, x_t):
    """q(x_{t-1} | x_t, x_0) has the precision and the mean of the product q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    tables = make_tables(*process)
    beta, prev = np.exp(tables.log_beta[1:]), tables.sqrt_alpha_bar[:-1] ** 2
    precision = (1 - beta) / beta + 1 / (1 - prev)
    mean = (np.sqrt(1 - beta) / beta * x_t + np.sqrt(prev) / (1 - prev) * x_0) / precision
    np.testing.assert_allclose(np.exp(-tables.posterior_log_var[1:]), precision, rtol=1e-6)
    ours = tables.posterior_coef_x0 * x_0 + tables.posterior_coef_xt * x_t
    np.testing.assert_allclose(ours[1:], mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours[0], x_0, atol=1e-6)
    assert tables.posterior_log_var[0] == tables.posterior_log_var[1]


@given(processes(), st.booleans())
def test_respacing_keeps_the_marginals_and_what_the_network_is_fed(process, rescale):
    original, keep = process
    spaced = make_tables(original, keep, rescale_timesteps=rescale)
    full = make_tables(original, rescale_timesteps=rescale)
    kept = np.arange(len(original)) if keep is None else keep
    np.testing.assert_array_equal(spaced.timesteps, kept)
    np.testing.assert_allclose(spaced.sqrt_alpha_bar, full.sqrt_alpha_bar[kept], rtol=1e-9)
    np.testing.assert_array_equal(spaced.model_timesteps, full.model_timesteps[kept])
    unit = 1000 / len(original) if rescale else 1
    np.testing.assert_allclose(spaced.model_timesteps, np.asarray(kept) * unit, rtol=1e-6)


def test_process_is_the_tables_cast_once():
    """At T = 4000, posterior variances computed in float32 would be off by 1e-3 and more."""
    tables, process = make_tables(cosine_betas(4000)), make_process(cosine_betas(4000))
    assert process.num_timesteps == 4000
    assert process.timesteps.dtype == jnp.int32
    for name in ("log_beta", "sqrt_alpha_bar", "posterior_log_var", "posterior_coef_x0", "sqrt_recipm1_alpha_bar"):
        assert getattr(process, name).dtype == jnp.float32
        np.testing.assert_array_equal(getattr(process, name), getattr(tables, name).astype(np.float32))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    t = jnp.array([0, 1, 30, 59])
    x_0, eps = rng.uniform(-1, 1, (4, 3, 3, 2)), rng.normal(size=(4, 3, 3, 2))
    return make_process(linear_betas(60)), x_0.astype(np.float32), eps.astype(np.float32), t


def test_x0_and_eps_are_inverses(batch):
    process, x_0, eps, t = batch
    level = level_at(process, t)
    x_t = add_noise(level, x_0, eps)
    np.testing.assert_allclose(x0_from_eps(level, eps, x_t), x_0, atol=1e-4)
    np.testing.assert_allclose(eps_from_x0(level, x_0, x_t), eps, atol=1e-4)
    np.testing.assert_allclose(eps_from_x0(level, x0_from_eps(level, eps, x_t), x_t), eps, atol=1e-4)


def test_noise_is_added_as_the_marginal_says(batch):
    """q(x_t | x_0) has the mean alpha_bar^1/2 x_0 and the variance 1 - alpha_bar."""
    process, x_0, eps, t = batch
    level, alpha_bar = level_at(process, t), np.cumprod(1 - linear_betas(60))[t][:, None, None, None]
    mean = np.sqrt(alpha_bar) * x_0
    np.testing.assert_allclose(add_noise(level, x_0, 0 * eps), mean, rtol=1e-6)
    np.testing.assert_allclose(add_noise(level, x_0, eps) - mean, np.sqrt(1 - alpha_bar) * eps, atol=1e-6)


def test_levels_agree_with_themselves(batch):
    process, _, _, _ = batch
    level = level_at(process, jnp.arange(60))
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose(level.inv_alpha, 1 / level.alpha, rtol=1e-6)
    np.testing.assert_allclose(level.noise_to_signal, level.sigma / level.alpha, rtol=1e-6)
    np.testing.assert_allclose(level.log_snr, -2 * np.log(level.noise_to_signal), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(level.network_time, process.model_timesteps)


def test_the_steps_lead_from_noise_to_the_image(batch):
    process, _, _, _ = batch
    steps = transitions(process)
    np.testing.assert_array_equal(steps.level.index, np.arange(60)[::-1])
    np.testing.assert_array_equal(steps.remaining, np.arange(60)[::-1])
    for field in ("alpha", "sigma", "inv_alpha", "noise_to_signal", "log_snr"):
        after = getattr(steps.next, field)
        np.testing.assert_array_equal(after[:-1], getattr(steps.level, field)[1:])
        assert after[-1] == getattr(clean_level(), field)


def test_each_example_has_its_own_timestep(batch):
    process, x_0, eps, t = batch
    x_t = add_noise(level_at(process, t), x_0, eps)
    together = q_posterior(transition_at(process, t), x_0, x_t)
    for i in range(len(t)):
        alone = q_posterior(transition_at(process, t[i : i + 1]), x_0[i : i + 1], x_t[i : i + 1])
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda x, i=i: x[i : i + 1], together))


@pytest.mark.parametrize("bad", [[0.1], [0.1, 0.0], [0.1, 1.0], [-0.1, 0.1], [0.1, np.nan]])
def test_refuses_betas_outside_the_unit_interval(bad):
    with pytest.raises(ValueError, match=r"at least two numbers in \(0, 1\)"):
        make_tables(np.array(bad))


@pytest.mark.parametrize("keep", [[0, 3, 2], [0, 0], [-1, 2], [0, 5]])
def test_refuses_timesteps_that_do_not_ascend(keep):
    with pytest.raises(ValueError, match=r"ascend within 0\.\.4"):
        make_tables(np.full(5, 0.1), keep)


@pytest.mark.parametrize("keep", [[], [3]])
def test_refuses_fewer_than_two_timesteps(keep):
    with pytest.raises(ValueError, match=f"at least 2 timesteps, got {len(keep)}"):
        make_tables(np.full(5, 0.1), keep)
