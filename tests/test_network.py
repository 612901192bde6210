import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.unet import UNet

TINY = dict(
    image_size=4,
    out_channels=3,
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    num_heads=1,
    num_classes=None,
)


@pytest.fixture(scope="module")
def network():
    return make_network(UNet, **TINY)


@pytest.fixture(scope="module")
def params(network):
    return jax.jit(network.init)(jax.random.key(0))


def test_parameters_are_named_arrays(network, params):
    assert "down.1.layers.0.conv_in.kernel" in params
    assert params["time_in.kernel"].shape == (32, 128)
    assert all(isinstance(value, jax.Array) for value in params.values())
    abstract = abstract_params(network)
    assert abstract.keys() == params.keys()
    assert all(abstract[name].shape == params[name].shape for name in params)


def test_init_is_a_function_of_the_key(network, params):
    init = jax.jit(network.init)
    again, other = init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    kernel = "down.1.layers.0.conv_in.kernel"
    assert (params[kernel] != other[kernel]).mean() > 0.99
    bound = 1 / np.sqrt(9 * 32)  # torch's uniform initialisation of a convolution
    assert 0.99 * bound < jnp.abs(params[kernel]).max() <= bound
    np.testing.assert_allclose(params[kernel].std(), bound / np.sqrt(3), rtol=0.02)


def test_apply_is_pure(network, params):
    x_t, t = jnp.ones((2, 4, 4, 3)), jnp.array([1.0, 2.0])
    before = jax.tree.map(jnp.copy, params)
    fresh = params | {"conv_out.kernel": jnp.ones((3, 3, 32, 3))}  # not zero
    apply = xla.jit(network.apply)
    first, second = apply(fresh, x_t, t, {}), apply(fresh, x_t, t, {})
    np.testing.assert_array_equal(first, second)
    assert jnp.abs(first).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_fresh_network_predicts_zero(network, params):
    """Its last convolution starts at zero."""
    x_t = jnp.ones((2, 4, 4, 3))
    np.testing.assert_array_equal(xla.jit(network.apply)(params, x_t, jnp.ones(2), {}), 0 * x_t)


def test_apply_uses_every_parameter(network, params):
    """A parameter that apply misses is a KeyError, so none comes from elsewhere."""
    x_t, t = jnp.ones((1, 4, 4, 3)), jnp.ones(1)
    for name in params:
        without = {other: value for other, value in params.items() if other != name}
        with pytest.raises(KeyError, match=name):
            jax.eval_shape(network.apply, without, x_t, t, {})


def test_parameters_and_gradients_are_one_tree(network, params):
    x_t, t = jnp.ones((1, 4, 4, 3)), jnp.ones(1)
    gradients = jax.eval_shape(jax.grad(lambda params: network.apply(params, x_t, t, {}).sum()), params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
