"""Random streams: every draw is a pure function of (key, name, step) or of (key, sample id).

Owns how keys are derived. Nothing else in the project splits keys to name a purpose, and no key has a default.
"""

import zlib

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Int, Key


def root(seed: int, sharding: jax.sharding.Sharding) -> Key:
    """The key that all of a run's randomness is derived from, on the devices of every process."""
    return jax.jit(lambda: jax.random.key(seed), out_shardings=sharding)()


def stream(key: Key, name: str, step: int | jax.Array = 0) -> Key:
    """Derives the key of one purpose at one step.

    Args:
        key: the run's root key.
        name: the purpose, for instance "noise". Different names give independent streams.
        step: optimizer step, sampling step, or another counter >= 0; may be traced.

    Returns:
        A key that depends on all three arguments and on nothing else.
    """
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


class Rngs:
    """Keys for a network's parameters in the order in which it makes them: those of flax.nnx.Rngs(key), bit for bit.

    Flax counts in a variable of its own, which takes longer to trace than all else that a module makes.
    """

    def __init__(self, key: Key):
        """Starts with the first parameter."""
        self._key = key
        self._count = 0

    def params(self) -> Key:
        """The next parameter's key; the name is what Flax's layers call."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


def sample_noise(key: Key, ids: Int[Array, "n 2"], shape: tuple[int, ...]) -> jax.Array:
    """Draws standard normal noise that belongs to sample ids, not to positions in a batch.

    Args:
        key: a stream's key.
        ids: i32[n, 2], (class id, index within the class) of each sample.
        shape: the shape of one sample, for instance (h, w, c).

    Returns:
        f32[n, *shape]; row i depends only on (key, ids[i]), so any batch split gives the same samples.
    """

    def one(sample_id):
        sample_key = jax.random.fold_in(jax.random.fold_in(key, sample_id[0]), sample_id[1])
        return jax.random.normal(sample_key, shape, jnp.float32)

    return jax.vmap(one)(ids)
