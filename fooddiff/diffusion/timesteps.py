"""Which timestep each training example gets: uniformly, or by the second moment of the losses seen so far."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Float, Int, Key, PerExample, Timestep


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossHistory:
    """The last K losses of each timestep, oldest first; part of the training state."""

    losses: Float[Array, "T K"]
    counts: Int[Array, " T"]  # how many of them have been filled, at most K


def empty_history(num_timesteps: int, per_term: int = 10) -> LossHistory:
    """A history without losses. K = 10 is the value of IDDPM section 3.3."""
    return LossHistory(losses=jnp.zeros((num_timesteps, per_term)), counts=jnp.zeros((num_timesteps,), jnp.int32))


def update_history(history: LossHistory, t: Timestep, loss: PerExample) -> LossHistory:
    """Appends unweighted losses in batch order; a full row drops its oldest.

    Args:
        history: the history.
        t: i32[n]; the same t may occur several times.
        loss: f32[n], without importance weights.

    Returns:
        The new history.
    """
    capacity = history.losses.shape[1]

    def append(carry, item):
        losses, counts = carry
        t_i, loss_i = item
        row, count = losses[t_i], counts[t_i]
        shifted = jnp.append(row[1:], loss_i)
        row = jnp.where(count == capacity, shifted, row.at[count].set(loss_i, mode="drop"))
        return (losses.at[t_i].set(row), counts.at[t_i].set(jnp.minimum(count + 1, capacity))), None

    (losses, counts), _ = jax.lax.scan(append, (history.losses, history.counts), (t, loss))
    return LossHistory(losses=losses, counts=counts)


def uniform_probs(num_timesteps: int) -> Float[Array, " T"]:
    """1/T for every timestep."""
    return jnp.full((num_timesteps,), 1 / num_timesteps)


def second_moment_probs(history: LossHistory, *, uniform_prob: float = 0.001) -> Float[Array, " T"]:
    """p_t proportional to E[L_t^2]^1/2 (IDDPM eq. 18), uniform until every row of the history is full.

    Args:
        history: the history.
        uniform_prob: share of a uniform distribution that is mixed in, so that no p_t is zero.

    Returns:
        f32[T], sums to 1.
    """
    num_timesteps, capacity = history.losses.shape
    uniform = uniform_probs(num_timesteps)
    root_moment = jnp.sqrt((history.losses**2).mean(axis=1))
    probs = (1 - uniform_prob) * root_moment / root_moment.sum() + uniform_prob * uniform
    return jnp.where((history.counts == capacity).all(), probs, uniform)


def sample_t(key: Key, n: int, probs: Float[Array, " T"]) -> tuple[Timestep, PerExample]:
    """Draws timesteps and the weights that keep the expected loss unchanged.

    Args:
        key: a random key.
        n: how many.
        probs: f32[T], sums to 1.

    Returns:
        (t, weight): i32[n] and f32[n] with weight = 1 / (T p_t).
    """
    t = jax.random.choice(key, probs.shape[0], (n,), p=probs).astype(jnp.int32)
    return t, 1 / (probs.shape[0] * probs[t])
