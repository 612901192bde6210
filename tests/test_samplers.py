from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion import continuous
from fooddiff.diffusion.denoiser import Prediction, clipped, fixed_small, learned_range, make_denoiser, read_eps
from fooddiff.diffusion.discrete import level_at, make_process, transition_at, transitions
from fooddiff.diffusion.level import add_noise, eps_from_x0, per_image, q_posterior
from fooddiff.diffusion.samplers import (
    MAX_CHURN,
    ancestral,
    ancestral_step,
    begin,
    ddim,
    ddim_step,
    dpmpp_2m,
    heun,
    sde_dpmpp_2m,
)
from fooddiff.diffusion.schedule import cosine_betas
from fooddiff.keys import sample_noise

PROCESS = make_process(cosine_betas(50))
T = jnp.array([0, 1, 25, 45])
HERE = transition_at(PROCESS, T)
DISCRETE = transitions(make_process(cosine_betas(200)))
CONTINUOUS = continuous.transitions(np.linspace(-12, 12, 400))


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    x_0, eps, noise = rng.uniform(-1, 1, (4, 3, 3, 2)), rng.normal(size=(4, 3, 3, 2)), rng.normal(size=(4, 3, 3, 2))
    return tuple(jnp.asarray(array, jnp.float32) for array in (x_0, eps, noise))


def sample(sampler, denoise, steps, x_T, noise, cond=None):
    """All of a sampler's steps from x_T to x_0."""
    return sampler(denoise, steps, begin(x_T), noise, cond or {}).x_t


def predicted(output, x_t, log_var=fixed_small):
    """What a denoiser with this network output says of x_t at HERE."""
    return make_denoiser(lambda *_: output, read_eps, log_var)(x_t, HERE.level, {})


def gaussian(x_t, level, cond, m=0.3, s=0.4):
    """The exact denoiser of data ~ N(m, s^2)."""
    alpha, sigma = per_image(level.alpha), per_image(level.sigma)
    x_0 = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * m)
    return Prediction(x_0, eps_from_x0(level, x_0, x_t), None)


@pytest.mark.parametrize(
    "steps", [pytest.param(DISCRETE, id="discrete"), pytest.param(CONTINUOUS, id="continuous", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "sampler",
    [ancestral, ddim, partial(ddim, eta=0.5), dpmpp_2m, sde_dpmpp_2m, heun],
    ids=["ancestral", "ddim", "ddim_eta0.5", "dpmpp_2m", "sde_dpmpp_2m", "heun"],
)
def test_the_exact_model_of_a_gaussian_recovers_it(sampler, steps):
    """16384 pixels put the mean within 0.01 and the deviation within 2 %."""
    ids, key, shape = jnp.zeros((1, 2), jnp.int32), jax.random.key(0), (128, 128, 1)
    x_T = sample_noise(jax.random.fold_in(key, 1000), ids, shape)
    x_0 = sample(sampler, gaussian, steps, x_T, lambda t: sample_noise(jax.random.fold_in(key, t), ids, shape))
    np.testing.assert_allclose(x_0.mean(), 0.3, atol=0.012)
    np.testing.assert_allclose(x_0.std(), 0.4, rtol=0.03)


@pytest.mark.slow
def test_heun_with_churn_recovers_the_gaussian():
    ids, key, shape = jnp.zeros((1, 2), jnp.int32), jax.random.key(0), (128, 128, 1)
    sampler = partial(heun, churn=MAX_CHURN, level_of=continuous.level_of)
    x_T = sample_noise(jax.random.fold_in(key, 1000), ids, shape)
    x_0 = sample(sampler, gaussian, CONTINUOUS, x_T, lambda t: sample_noise(jax.random.fold_in(key, t), ids, shape))
    np.testing.assert_allclose(x_0.mean(), 0.3, atol=0.012)
    np.testing.assert_allclose(x_0.std(), 0.4, rtol=0.03)


def test_ancestral_noise_has_the_models_deviation(images):
    x_t, output, noise = images
    prediction = predicted(jnp.concatenate([output, jnp.sin(x_t)], axis=-1), x_t, learned_range)
    still, moved = (ancestral_step(prediction, x_t, HERE, scale * noise) for scale in (0.0, 1.0))
    deviation = jnp.exp(0.5 * learned_range(HERE.level, jnp.sin(x_t)))
    np.testing.assert_allclose((moved - still)[1:], (deviation * noise)[1:], atol=1e-6)
    np.testing.assert_array_equal(moved[0], still[0])


def test_ancestral_takes_the_posteriors_deviation_where_none_is_modelled(images):
    x_t, output, noise = images
    prediction = predicted(output, x_t)
    np.testing.assert_array_equal(
        ancestral_step(prediction, x_t, HERE, noise),
        ancestral_step(prediction._replace(log_var=None), x_t, HERE, noise),
    )


def test_ddim_with_eta_0_ignores_noise_and_the_learned_variance(images):
    x_t, output, noise = images
    x_prev = ddim_step(predicted(output, x_t), x_t, HERE, noise)
    np.testing.assert_array_equal(x_prev, ddim_step(predicted(output, x_t), x_t, HERE, -5 * noise))
    both = predicted(jnp.concatenate([output, noise], axis=-1), x_t, learned_range)
    np.testing.assert_array_equal(x_prev, ddim_step(both, x_t, HERE, noise))


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posterior_variance(images):
    x_0, eps, noise = images
    x_t = add_noise(HERE.level, x_0, eps)
    one = ddim_step(predicted(eps, x_t), x_t, HERE, noise, eta=1.0)
    np.testing.assert_allclose(one, ancestral_step(predicted(eps, x_t), x_t, HERE, noise), atol=2e-4)


def test_ddim_follows_the_marginals(images):
    """With the true eps and eta = 0, x_{t-1} has the same x_0 and eps; and so has x_{t+1}, by which DDIM encodes."""
    x_0, eps, noise = images
    x_t = add_noise(HERE.level, x_0, eps)
    x_prev = ddim_step(predicted(eps, x_t), x_t, HERE, noise)
    np.testing.assert_allclose(x_prev[0], x_0[0], atol=1e-5)
    np.testing.assert_allclose(x_prev[1:], add_noise(HERE.next, x_0, eps)[1:], atol=1e-4)
    more = level_at(PROCESS, T + 1)
    encoded = ddim_step(predicted(eps, x_t), x_t, HERE._replace(next=more), noise)
    np.testing.assert_allclose(encoded, add_noise(more, x_0, eps), atol=1e-4)


def test_the_last_step_ends_at_the_predicted_x0(images):
    x_t, output, noise = images
    first = transition_at(PROCESS, jnp.zeros(4, jnp.int32))
    prediction = clipped(make_denoiser(lambda *_: 4 * output, read_eps, fixed_small))(x_t, first.level, {})
    for step in (ancestral_step, ddim_step, partial(ddim_step, eta=1.0)):
        np.testing.assert_allclose(step(prediction, x_t, first, noise), prediction.x_0, atol=1e-5)


@pytest.mark.parametrize("sampler", [ancestral, ddim, dpmpp_2m, sde_dpmpp_2m, heun])
def test_every_level_is_visited_once_in_descending_order(sampler):
    steps = transitions(make_process(cosine_betas(40), [3, 7, 20, 39]))
    seen = []

    def denoise(x_t, level, cond):
        jax.debug.callback(lambda t: seen.append(float(t)), level.network_time[0], ordered=True)
        assert cond == {"y": 5}
        return Prediction(x_t, 0 * x_t, None)

    x_T = jnp.ones((2, 1, 1, 1))
    jax.block_until_ready(sample(sampler, denoise, steps, x_T, lambda t: x_T, {"y": 5}))
    jax.effects_barrier()
    once = [39 * 25, 20 * 25, 7 * 25, 3 * 25]
    assert seen == ([t for pair in pairwise(once) for t in pair] + once[-1:] if sampler is heun else once)


def test_noise_is_named_by_the_steps_that_follow():
    steps = transitions(make_process(cosine_betas(40), [3, 7, 20, 39]))
    seen = []

    def noise(remaining):
        jax.debug.callback(lambda t: seen.append(int(t)), remaining, ordered=True)
        return jnp.zeros((1, 1, 1, 1))

    jax.block_until_ready(sample(ancestral, gaussian, steps, jnp.ones((1, 1, 1, 1)), noise))
    jax.effects_barrier()
    assert seen == [3, 2, 1, 0]


def test_samples_do_not_depend_on_the_batch_that_they_are_in():
    def run(ids):
        def noise(t):
            return sample_noise(jax.random.fold_in(jax.random.key(1), t), ids, (4, 4, 3))

        return sample(ancestral, gaussian, transitions(PROCESS), noise(50), noise)

    ids = jnp.array([[0, 0], [0, 1], [5, 0]])
    np.testing.assert_allclose(run(ids)[1:2], run(ids[1:2]), atol=1e-5)


def error(sampler, steps):
    """How far a sampler of the exact model ends from where its ODE does, from log SNR -4 to 9 in even steps."""
    levels = continuous.transitions(np.linspace(-4, 9, steps))
    x_T = jnp.linspace(-2, 2, 64).reshape(1, 8, 8, 1)
    first = jax.tree.map(lambda field: field[0], levels.level)
    deviation = jnp.sqrt(first.alpha**2 * 0.4**2 + first.sigma**2)
    end = 0.3 + 0.4 * (x_T - first.alpha * 0.3) / deviation
    # what the levels beyond 9 would still change is the same for all: the step to x_0 itself
    return float(jnp.abs(sample(sampler, gaussian, levels, x_T, lambda t: jnp.zeros_like(x_T)) - end).max())


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2), (heun, 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler, order):
    reached = np.log2(error(sampler, 16) / error(sampler, 64)) / 2
    assert reached > order - 0.35
    assert order == 2 or reached < 1.4


def test_second_order_beats_four_times_as_many_steps_of_first_order():
    assert error(dpmpp_2m, 16) < error(ddim, 64)
    assert error(heun, 16) < error(ddim, 64)


def test_multistep_samplers_are_the_one_step_ones_where_the_prediction_is_constant(images):
    """DPM-Solver++(2M) is then DDIM, and its stochastic form draws from the posterior."""
    x_0, eps, noise = images

    def constant(x_t, level, cond):
        return Prediction(x_0, eps_from_x0(level, x_0, x_t), None)

    steps = transitions(PROCESS)
    for multi, single in [(dpmpp_2m, ddim), (sde_dpmpp_2m, ancestral)]:
        ours, theirs = (sample(each, constant, steps, eps, lambda t: noise) for each in (multi, single))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_transition_of_a_discrete_process_is_that_of_the_same_levels_in_continuous_time(images):
    x_0, eps, _ = images
    discrete = transitions(PROCESS)
    same = continuous.transitions(np.asarray(discrete.level.log_snr, np.float64))
    for ours, theirs in zip(same, discrete, strict=True):
        if not hasattr(ours, "_fields"):
            np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=2e-3, atol=1e-6)
    inner = jax.tree.map(lambda field: field[10:14], same)
    x_t = add_noise(inner.level, x_0, eps)
    there = transition_at(PROCESS, jnp.array([39, 38, 37, 36]))
    np.testing.assert_allclose(q_posterior(inner, x_0, x_t).mean, q_posterior(there, x_0, x_t).mean, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 200])
@pytest.mark.parametrize("sampler", [dpmpp_2m, sde_dpmpp_2m, heun])
def test_finite_with_any_number_of_steps(sampler, steps):
    process = make_process(cosine_betas(200), np.linspace(0, 199, steps).round().astype(int))
    x_T = jnp.linspace(-3, 3, 48).reshape(1, 4, 4, 3)
    denoise = clipped(make_denoiser(lambda x, t, cond: x, read_eps))
    x_0 = sample(sampler, denoise, transitions(process), x_T, lambda t: x_T)
    assert jnp.isfinite(x_0).all()
    assert jnp.abs(x_0).max() <= 1 + 1e-5


def test_ddim_with_eta_1_is_finite_in_two_steps():
    steps = transitions(make_process(cosine_betas(200), [0, 199]))  # where rounding leaves less than no variance
    x_0 = sample(partial(ddim, eta=1.0), gaussian, steps, jnp.ones((1, 2, 2, 1)), lambda t: jnp.ones((1, 2, 2, 1)))
    assert jnp.isfinite(x_0).all()


@pytest.mark.parametrize("sampler", [ancestral, ddim, dpmpp_2m, sde_dpmpp_2m, heun])
def test_a_level_may_repeat(sampler):
    steps = continuous.transitions(np.array([-4.0, -4.0, -1.0, 2.0, 2.0, 2.0]))
    x_0 = sample(sampler, gaussian, steps, jnp.ones((1, 2, 2, 1)), lambda t: jnp.zeros((1, 2, 2, 1)))
    assert jnp.isfinite(x_0).all()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [ancestral, partial(ddim, eta=0.5), dpmpp_2m, sde_dpmpp_2m, heun])
def test_steps_may_be_taken_in_parts(sampler):
    """Looking at the images in between changes none of them."""
    steps, key = transitions(make_process(cosine_betas(40), [3, 7, 20, 39])), jax.random.key(0)
    ids, shape = jnp.array([[0, 0], [0, 1]]), (4, 4, 3)

    def noise(remaining):
        return sample_noise(jax.random.fold_in(key, remaining), ids, shape)

    descent = begin(x_T := noise(9))
    for i in range(4):
        descent = sampler(gaussian, jax.tree.map(lambda field: field[i : i + 1], steps), descent, noise, {})  # noqa: B023
        assert jnp.isfinite(descent.x_0).all()
    whole = sampler(gaussian, steps, begin(x_T), noise, {})
    for ours, theirs in zip(descent, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
