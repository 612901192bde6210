import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion.timesteps import (
    LossHistory,
    empty_history,
    sample_t,
    second_moment_probs,
    uniform_probs,
    update_history,
)


@pytest.fixture
def full():
    losses = np.random.default_rng(0).uniform(0.1, 2, (5, 3)).astype(np.float32)
    return LossHistory(losses=jnp.asarray(losses), counts=jnp.full(5, 3))


def test_weights_keep_the_expected_loss(full):
    """E[weight_t L_t] under p equals the mean of L_t over uniform t, for any p."""
    loss = jnp.arange(1.0, 6.0)
    for probs in (uniform_probs(5), second_moment_probs(full)):
        t, weight = sample_t(jax.random.key(0), 4000, probs)
        np.testing.assert_allclose(weight, 1 / (5 * probs[t]), rtol=1e-6)
        by_t = jnp.zeros(5).at[t].set(weight)  # every t is drawn
        np.testing.assert_allclose((probs * by_t * loss).sum(), loss.mean(), rtol=1e-5)
        error = 4 * (weight * loss[t]).std() / np.sqrt(4000)
        np.testing.assert_allclose((weight * loss[t]).mean(), loss.mean(), atol=error)


def test_t_is_drawn_with_its_probability():
    probs = jnp.array([0.5, 0.3, 0.0, 0.2])
    t, _ = sample_t(jax.random.key(0), 10_000, probs)
    assert t.dtype == jnp.int32
    np.testing.assert_allclose(np.bincount(t, minlength=4) / 10_000, probs, atol=0.02)
    assert (t != 2).all()


def test_t_is_a_function_of_the_key():
    draw = [sample_t(jax.random.key(seed), 50, uniform_probs(1000))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).mean() > 0.9


def test_history_appends_in_batch_order_and_drops_the_oldest():
    history = empty_history(3, per_term=2)
    history = update_history(history, jnp.array([1, 0, 1]), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(history.losses, [[2, 0], [1, 3], [0, 0]])
    np.testing.assert_array_equal(history.counts, [1, 2, 0])
    history = update_history(history, jnp.array([1, 1, 0, 1]), jnp.array([4.0, 5.0, 6.0, 7.0]))
    np.testing.assert_array_equal(history.losses, [[2, 6], [5, 7], [0, 0]])
    np.testing.assert_array_equal(history.counts, [2, 2, 0])


def test_uniform_until_every_timestep_is_full(full):
    nearly = LossHistory(losses=full.losses, counts=full.counts.at[3].set(2))
    np.testing.assert_array_equal(second_moment_probs(nearly), uniform_probs(5))
    assert jnp.ptp(second_moment_probs(full)) > 0.01


def test_probabilities_follow_the_second_moment(full):
    moments = np.sqrt((np.asarray(full.losses) ** 2).mean(axis=1))
    np.testing.assert_allclose(second_moment_probs(full, uniform_prob=0.0), moments / moments.sum(), rtol=1e-5)
    mixed = second_moment_probs(full, uniform_prob=0.25)
    np.testing.assert_allclose(mixed, 0.75 * moments / moments.sum() + 0.25 / 5, rtol=1e-5)
    np.testing.assert_allclose(mixed.sum(), 1, rtol=1e-6)


def test_the_uniform_share_keeps_every_probability_positive(full):
    zero = LossHistory(losses=full.losses.at[2].set(0.0), counts=full.counts)
    np.testing.assert_allclose(second_moment_probs(zero)[2], 0.001 / 5, rtol=1e-5)
