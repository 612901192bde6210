from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.process import make_process, q_sample, x0_from_eps
from fooddiff.diffusion.reverse import Parameterization, eps_target, fixed_small, learned_range
from fooddiff.diffusion.samplers import ancestral_step, ddim_reverse_step, ddim_step, dpmpp_2m_step, sample, single
from fooddiff.diffusion.schedule import cosine_betas
from fooddiff.keys import sample_noise

PROCESS = make_process(cosine_betas(50))
EPS = Parameterization(x0_from_eps, eps_target, fixed_small)
LEARNED = Parameterization(x0_from_eps, eps_target, learned_range)
T = jnp.array([0, 1, 25, 45])


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    x_0, eps, noise = rng.uniform(-1, 1, (4, 3, 3, 2)), rng.normal(size=(4, 3, 3, 2)), rng.normal(size=(4, 3, 3, 2))
    return tuple(jnp.asarray(array, jnp.float32) for array in (x_0, eps, noise))


@pytest.mark.parametrize(
    "step", [ancestral_step, ddim_step, partial(ddim_step, eta=0.5)], ids=["ancestral", "ddim", "ddim_eta0.5"]
)
def test_the_exact_model_of_a_gaussian_recovers_it(step):
    """eps of data ~ N(m, s^2) is known in closed form; 16384 pixels put the mean within 0.01 and s within 2 %."""
    m, s = 0.3, 0.4
    process = make_process(cosine_betas(200))

    def denoise(x_t, model_t, y):
        t = jnp.searchsorted(process.model_timesteps, model_t[0])
        alpha_bar = process.alpha_bar[t]
        score = (x_t - jnp.sqrt(alpha_bar) * m) / (alpha_bar * s**2 + 1 - alpha_bar)
        return jnp.sqrt(1 - alpha_bar) * score

    ids, key, shape = jnp.zeros((1, 2), jnp.int32), jax.random.key(0), (128, 128, 1)
    x_0 = sample(
        single(partial(step, clip=False)),
        process,
        EPS,
        denoise,
        sample_noise(jax.random.fold_in(key, process.num_timesteps), ids, shape),
        lambda t: sample_noise(jax.random.fold_in(key, t), ids, shape),
        None,
    )
    np.testing.assert_allclose(x_0.mean(), m, atol=0.012)
    np.testing.assert_allclose(x_0.std(), s, rtol=0.03)


def test_ancestral_noise_has_the_models_deviation(images):
    x_t, prediction, noise = images
    out = jnp.concatenate([prediction, jnp.sin(x_t)], axis=-1)
    still, moved = (ancestral_step(PROCESS, LEARNED, out, x_t, T, scale * noise) for scale in (0.0, 1.0))
    deviation = jnp.exp(0.5 * learned_range(PROCESS, jnp.sin(x_t), T))
    np.testing.assert_allclose((moved - still)[1:], (deviation * noise)[1:], atol=1e-6)
    np.testing.assert_array_equal(moved[0], still[0])


def test_ddim_with_eta_0_ignores_noise_and_the_learned_variance(images):
    x_t, prediction, noise = images
    x_prev = ddim_step(PROCESS, EPS, prediction, x_t, T, noise)
    np.testing.assert_array_equal(x_prev, ddim_step(PROCESS, EPS, prediction, x_t, T, -5 * noise))
    out = jnp.concatenate([prediction, noise], axis=-1)
    np.testing.assert_array_equal(x_prev, ddim_step(PROCESS, LEARNED, out, x_t, T, noise))


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posterior_variance(images):
    x_0, eps, noise = images
    x_t = q_sample(PROCESS, x_0, T, eps)
    ddim = ddim_step(PROCESS, EPS, eps, x_t, T, noise, eta=1.0, clip=False)
    np.testing.assert_allclose(ddim, ancestral_step(PROCESS, EPS, eps, x_t, T, noise, clip=False), atol=2e-4)


def test_ddim_follows_the_marginals(images):
    """With the true eps and eta = 0, x_{t-1} is the q_sample of the same x_0 and eps."""
    x_0, eps, noise = images
    x_prev = ddim_step(PROCESS, EPS, eps, q_sample(PROCESS, x_0, T, eps), T, noise, clip=False)
    np.testing.assert_allclose(x_prev[0], x_0[0], atol=1e-5)
    np.testing.assert_allclose(x_prev[1:], q_sample(PROCESS, x_0, T - 1, eps)[1:], atol=1e-4)


def test_ddim_reverse_step_undoes_ddim(images):
    x_0, eps, noise = images
    x_t = q_sample(PROCESS, x_0, T, eps)
    more = ddim_reverse_step(PROCESS, EPS, eps, x_t, T, clip=False)
    np.testing.assert_allclose(more, q_sample(PROCESS, x_0, T + 1, eps), atol=1e-4)
    np.testing.assert_allclose(ddim_step(PROCESS, EPS, eps, more, T + 1, noise, clip=False), x_t, atol=1e-4)


@pytest.mark.parametrize("step", [ancestral_step, ddim_step, ddim_reverse_step])
def test_steps_clip_unless_told(images, step):
    x_t, prediction, noise = images
    arguments = (PROCESS, EPS, 4 * prediction, x_t, T) + (() if step is ddim_reverse_step else (noise,))
    np.testing.assert_array_equal(step(*arguments), step(*arguments, clip=True))
    assert jnp.abs(step(*arguments) - step(*arguments, clip=False)).max() > 0.1


def test_clipped_x0_is_where_the_last_step_ends(images):
    x_t, prediction, noise = images
    first = jnp.zeros(4, jnp.int32)
    for step in (ancestral_step, ddim_step):
        x_0 = step(PROCESS, EPS, 4 * prediction, x_t, first, noise)
        np.testing.assert_allclose(x_0, jnp.clip(x_0, -1, 1), atol=1e-5)


def test_sample_visits_every_kept_timestep_once_in_descending_order():
    """x -> 2 x + (what the network was fed) is a number that spells the whole run."""
    process = make_process(cosine_betas(40), [3, 7, 20, 39])

    def step(process, param, out, x_t, t, noise):
        return 2 * x_t + out + 1000 * noise + 100_000 * t[:, None, None, None]

    def denoise(x_t, t, y):
        return jnp.broadcast_to((t + y)[:, None, None, None], x_t.shape)

    x_T = jnp.ones((2, 1, 1, 1))
    y = jnp.array([0.0, 0.5])
    actual = sample(single(step), process, EPS, denoise, x_T, lambda t: jnp.full(x_T.shape, t * 1.0), y)
    expected = np.ones(2)
    for index, timestep in reversed(list(enumerate([3, 7, 20, 39]))):
        expected = 2 * expected + (timestep * 25 + np.asarray(y)) + 1000 * index + 100_000 * index
    np.testing.assert_allclose(actual[:, 0, 0, 0], expected, rtol=1e-6)


def test_samples_do_not_depend_on_the_batch_that_they_are_in():
    def run(ids):
        def noise(t):
            return sample_noise(jax.random.fold_in(jax.random.key(1), t), ids, (4, 4, 3))

        return sample(single(ancestral_step), PROCESS, EPS, lambda x, t, y: jnp.tanh(x), noise(50), noise, None)

    ids = jnp.array([[0, 0], [0, 1], [5, 0]])
    np.testing.assert_allclose(run(ids)[1:2], run(ids[1:2]), atol=1e-5)


def linear_model(process, m=0.3, s=0.4):
    """The exact eps of data ~ N(m, s^2), and where its ODE ends: x_T, normalised, is x_0 normalised."""

    def denoise(x_t, model_t, y):
        alpha_bar = jnp.interp(model_t, process.model_timesteps, process.alpha_bar)[:, None, None, None]
        return jnp.sqrt(1 - alpha_bar) * (x_t - jnp.sqrt(alpha_bar) * m) / (alpha_bar * s**2 + 1 - alpha_bar)

    def end(x_T):
        alpha_bar = process.alpha_bar[-1]
        return m + s * (x_T - jnp.sqrt(alpha_bar) * m) / jnp.sqrt(alpha_bar * s**2 + 1 - alpha_bar)

    return denoise, end


def error(step, steps):
    """Of a sampler that starts where alpha_bar is 0.02 and takes some steps evenly spaced in lambda down to 0.9999."""
    lambdas = np.linspace(np.log(0.9999 / 0.0001), np.log(0.02 / 0.98), steps)
    alpha_bar = 1 / (1 + np.exp(-lambdas))
    process = make_process(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
    denoise, end = linear_model(process)
    x_T = jnp.linspace(-2, 2, 64).reshape(1, 8, 8, 1)
    actual = sample(step, process, EPS, denoise, x_T, lambda t: jnp.full(x_T.shape, jnp.nan), None)
    return float(jnp.abs(actual - end(x_T)).max())


def still(process, param, out, x_t, t, noise):
    """DDIM without the noise, which is not a number here."""
    return ddim_step(process, param, out, x_t, t, jnp.zeros_like(noise), clip=False)


def test_dpmpp_2m_converges_at_least_with_the_square_of_the_step_and_ddim_with_the_step():
    def order(step, few, many):
        return np.log2(error(step, few) / error(step, many)) / np.log2(many / few)

    assert order(single(still), 16, 64) == pytest.approx(1, abs=0.2)
    assert order(partial(dpmpp_2m_step, clip=False), 16, 64) > 1.8
    assert error(partial(dpmpp_2m_step, clip=False), 16) < error(single(still), 64)


def test_dpmpp_2m_is_ddim_where_it_has_one_prediction(images):
    """At the first step, at the last one, and wherever the step before predicted the same."""
    x_t, prediction, noise = images
    ends = jnp.array([0, 49, 0, 49])
    ddim = ddim_step(PROCESS, EPS, prediction, x_t, ends, noise)
    x_prev, x_0 = dpmpp_2m_step(PROCESS, EPS, prediction, x_t, ends, noise, 7 * noise)
    np.testing.assert_allclose(x_prev, ddim, atol=2e-5)
    x_prev, x_0 = dpmpp_2m_step(PROCESS, EPS, prediction, x_t, T, noise, noise)
    x_prev, again = dpmpp_2m_step(PROCESS, EPS, prediction, x_t, T, -noise, x_0)
    np.testing.assert_array_equal(x_0, again)
    np.testing.assert_allclose(x_prev, ddim_step(PROCESS, EPS, prediction, x_t, T, noise), atol=2e-5)


@pytest.mark.parametrize("steps", [2, 3, 200])
def test_dpmpp_2m_is_finite_with_any_number_of_steps(steps):
    process = make_process(cosine_betas(200), np.linspace(0, 199, steps).round().astype(int))
    x_T = jnp.linspace(-3, 3, 48).reshape(1, 4, 4, 3)
    x_0 = sample(dpmpp_2m_step, process, EPS, lambda x, t, y: x, x_T, lambda t: x_T, None)
    assert jnp.isfinite(x_0).all()
    assert jnp.abs(x_0).max() <= 1 + 1e-5
