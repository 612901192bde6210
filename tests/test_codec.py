import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.codec import to_signed, to_uint8


def test_inverts_to_signed_for_every_grey_level():
    levels = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(to_uint8(to_signed(levels)), levels)


def test_clips_and_rounds_to_nearest():
    images = jnp.array([-3.0, -1.0, 1.0, 7.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1])
    np.testing.assert_array_equal(to_uint8(images), [0, 0, 255, 255, 0, 1])


def test_to_signed_is_linear_from_minus_one_to_one():
    levels = jnp.arange(256, dtype=jnp.uint8)
    signed = to_signed(levels)
    assert signed.dtype == jnp.float32
    assert (float(signed[0]), float(signed[255])) == (-1.0, 1.0)
    np.testing.assert_allclose(np.diff(signed), 2 / 255, rtol=1e-4)
    np.testing.assert_array_equal(np.rint((np.asarray(signed) + 1) * 127.5), np.arange(256))


def test_to_signed_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        to_signed(jnp.zeros((2, 2)))
