import jax.numpy as jnp
import numpy as np

from fooddiff.data.preprocess import to_signed
from fooddiff.sample.pixels import to_uint8


def test_inverts_to_signed_for_every_grey_level():
    levels = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(to_uint8(to_signed(levels)), levels)


def test_clips_and_rounds_to_nearest():
    images = jnp.array([-3.0, -1.0, 1.0, 7.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1])
    np.testing.assert_array_equal(to_uint8(images), [0, 0, 255, 255, 0, 1])
