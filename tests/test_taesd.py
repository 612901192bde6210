"""What TAESD's settings do, and what is refused; the numbers are those of test_golden_ldm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.taesd import TAESD, from_taesd, settings_of, to_taesd

SETTINGS = dict(latent_channels=5, pools=True, channels=8)


@pytest.fixture(scope="module")
def taesd():
    network = make_network(TAESD, **SETTINGS)
    return network, network.init(jax.random.key(0))


def test_settings_are_seen_from_a_decoder(taesd):
    encoder, decoder = to_taesd(taesd[1])
    assert settings_of(decoder) == SETTINGS
    without = {name: value for name, value in decoder.items() if ".pool." not in name}
    assert settings_of(without) == SETTINGS | dict(pools=False)
    with pytest.raises(ValueError, match="no convolution"):
        settings_of(encoder | {"1.weight": np.ones(3)})


def test_shapes(taesd):
    network, params = taesd
    x = jnp.zeros((2, 16, 24, 3))
    encoded = jax.eval_shape(lambda x: network.apply(params, x, method=TAESD.encode), x)
    assert encoded.shape == (2, 2, 3, 5)
    assert jax.eval_shape(lambda z: network.apply(params, z, method=TAESD.decode), encoded).shape == x.shape
    with pytest.raises(ValueError, match="images of 12x16 cannot be encoded: expected multiples of 8"):
        network.apply(params, jnp.zeros((1, 12, 16, 3)), method=TAESD.encode)


def test_large_latents_saturate(taesd):
    network, params = taesd
    decode = xla.jit(lambda z: network.apply(params, z, method=TAESD.decode))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, 5)), jnp.float32)
    np.testing.assert_allclose(decode(1e3 * jnp.sign(z)), decode(1e4 * jnp.sign(z)), atol=1e-5)
    assert not np.allclose(decode(z), decode(2 * z), atol=1e-5)


def test_half_precision_files_become_float32(taesd):
    network, params = taesd
    halves = [{name: value.astype(np.float16) for name, value in half.items()} for half in to_taesd(params)]
    imported = from_taesd(*halves, abstract_params(network))
    assert all(value.dtype == np.float32 for value in imported.values())
    np.testing.assert_array_equal(
        imported["encoder.conv_in.kernel"], np.asarray(params["encoder.conv_in.kernel"]).astype(np.float16)
    )


@pytest.mark.parametrize("half", [0, 1])
def test_other_architectures_are_refused(taesd, half):
    network, params = taesd
    halves = list(to_taesd(params))
    halves[half] = {name: value for name, value in halves[half].items() if name != "5.conv.2.bias"}
    with pytest.raises(ValueError, match=r"5.conv.2.bias: the model has \(8,\), the file has none"):
        from_taesd(*halves, abstract_params(network))
    with pytest.raises(ValueError, match="of another architecture"):
        from_taesd(*reversed(to_taesd(params)), abstract_params(network))
