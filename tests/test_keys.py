import jax
import numpy as np
import pytest
from flax import nnx

from fooddiff.keys import Rngs, sample_noise, stream


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)))


def test_streams_differ_by_key_name_and_step():
    keys = [stream(jax.random.key(seed), name, step) for seed in (0, 1) for name in ("a", "b") for step in (0, 1)]
    assert len({data(key) for key in keys}) == len(keys)


def test_stream_is_reproducible_under_jit():
    key = jax.random.key(3)
    assert data(jax.jit(lambda step: stream(key, "t", step))(5)) == data(stream(jax.random.key(3), "t", 5))


def test_parameters_get_the_keys_that_flax_gives_them():
    ours, theirs = Rngs(jax.random.key(3)), nnx.Rngs(jax.random.key(3))
    keys = [data(ours.params()) for _ in range(4)]
    assert keys == [data(theirs.params()) for _ in range(4)]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("split", [1, 2, 5])
def test_sample_noise_belongs_to_the_id(split):
    ids = np.array([(y, i) for y in range(3) for i in range(4)], np.int32)[::-1]
    whole = sample_noise(jax.random.key(0), ids, (2, 2, 3))
    parts = [sample_noise(jax.random.key(0), ids[i : i + split], (2, 2, 3)) for i in range(0, len(ids), split)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len(np.unique(whole)) == whole.size  # (1, 2) and (2, 1) get different noise
