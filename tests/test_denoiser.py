import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion import denoiser
from fooddiff.diffusion.continuous import level_of
from fooddiff.diffusion.denoiser import (
    clipped,
    fixed_large,
    fixed_small,
    learned_range,
    make_denoiser,
    read_edm,
    read_eps,
    read_flow,
    read_v,
    read_x0,
    split_output,
)
from fooddiff.diffusion.discrete import level_at, make_process, transition_at
from fooddiff.diffusion.level import add_noise, eps_from_x0, per_image, q_posterior
from fooddiff.diffusion.schedule import cosine_betas

PROCESS = make_process(cosine_betas(50))
T = jnp.array([0, 1, 25, 45])
HERE = transition_at(PROCESS, T)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    x_0, eps = rng.uniform(-1, 1, (4, 3, 3, 2)), rng.normal(size=(4, 3, 3, 2))
    return jnp.asarray(x_0, jnp.float32), jnp.asarray(eps, jnp.float32)


def right_output(read, level, x_0, eps):
    """What a perfect network of each kind would say."""
    alpha, sigma = per_image(level.alpha), per_image(level.sigma)
    if read is read_edm:
        noise = sigma / alpha
        noisy, variance = x_0 + noise * eps, noise**2 + denoiser.EDM_DATA_STD**2
        skip, out = denoiser.EDM_DATA_STD**2 / variance, noise * denoiser.EDM_DATA_STD / jnp.sqrt(variance)
        return (x_0 - skip * noisy) / out
    return {read_eps: eps, read_x0: x_0, read_v: alpha * eps - sigma * x_0, read_flow: eps - x_0}[read]


@pytest.mark.parametrize("read", [read_eps, read_x0, read_v, read_flow, read_edm])
@pytest.mark.parametrize("level", [HERE.level, level_of(jnp.array([-6.0, -1.0, 2.0, 6.0]))])
def test_every_reading_of_the_right_output_gives_x0_and_eps(images, read, level):
    x_0, eps = images
    prediction = read(level, right_output(read, level, x_0, eps), add_noise(level, x_0, eps))
    np.testing.assert_allclose(prediction[0], x_0, atol=1e-4)
    np.testing.assert_allclose(prediction[1], eps, atol=1e-4)


@pytest.mark.parametrize(
    ("read", "error"),
    [(read_eps, denoiser.eps_error), (read_x0, denoiser.x0_error), (read_v, denoiser.v_error)],
)
def test_errors_are_in_the_space_of_the_output(images, read, error):
    x_0, eps = images
    x_t, wrong = add_noise(HERE.level, x_0, eps), jnp.cos(7 * eps)
    prediction = make_denoiser(lambda *_: wrong, read)(x_t, HERE.level, {})
    np.testing.assert_allclose(
        error(HERE.level, prediction, x_0, eps), right_output(read, HERE.level, x_0, eps) - wrong, atol=1e-5
    )


@pytest.mark.parametrize("read", [read_eps, read_x0])
def test_the_right_prediction_gives_the_posterior(images, read):
    x_0, eps = images
    x_t = add_noise(HERE.level, x_0, eps)
    output = right_output(read, HERE.level, x_0, eps)
    prediction = make_denoiser(lambda *_: output, read, fixed_small)(x_t, HERE.level, {})
    posterior = q_posterior(HERE, x_0, x_t)
    np.testing.assert_allclose(prediction.x_0, x_0, atol=1e-4)
    np.testing.assert_allclose(q_posterior(HERE, prediction.x_0, x_t).mean, posterior.mean, atol=1e-4)
    np.testing.assert_array_equal(prediction.log_var, posterior.log_var)


def test_the_network_sees_xt_its_own_time_and_the_conditions(images):
    x_t, _ = images
    seen = []

    def apply(*inputs):
        seen.extend(inputs)
        return x_t

    cond = {"y": jnp.arange(4)}
    make_denoiser(apply, read_eps)(x_t, HERE.level, cond)
    np.testing.assert_array_equal(seen[0], x_t)
    np.testing.assert_array_equal(seen[1], PROCESS.model_timesteps[T])
    assert seen[2] is cond


def test_clipping_bounds_x0_and_eps_follows(images):
    x_0, eps = images
    x_t = add_noise(HERE.level, x_0, eps)
    denoise = make_denoiser(lambda *_: 3 * eps, read_eps, fixed_small)
    free, bounded = denoise(x_t, HERE.level, {}), clipped(denoise)(x_t, HERE.level, {})
    assert jnp.abs(free.x_0).max() > 1
    np.testing.assert_array_equal(bounded.x_0, jnp.clip(free.x_0, -1, 1))
    np.testing.assert_array_equal(bounded.eps, eps_from_x0(HERE.level, bounded.x_0, x_t))
    np.testing.assert_array_equal(bounded.log_var, free.log_var)


def test_learned_range_interpolates_in_the_log_and_goes_beyond():
    low, high = per_image(PROCESS.posterior_log_var[T]), per_image(PROCESS.log_beta[T])
    v = jnp.ones((4, 2, 2, 3))
    for value, expected in [(-1, low), (1, high), (0, (low + high) / 2), (3, 2 * high - low)]:
        found = learned_range(HERE.level, value * v)
        np.testing.assert_allclose(found, jnp.broadcast_to(expected, v.shape), rtol=1e-6)


def test_fixed_variances_bracket_the_true_one():
    empty, level = jnp.zeros((4, 2, 2, 0)), level_at(PROCESS, T)
    small, large = fixed_small(level, empty), fixed_large(level, empty)
    np.testing.assert_array_equal(small, per_image(PROCESS.posterior_log_var[T]))
    np.testing.assert_array_equal(large[1:], per_image(PROCESS.log_beta[T])[1:])
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
