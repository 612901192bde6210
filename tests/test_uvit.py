import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.uvit import UViT, depth_to_space, space_to_depth, unit_rms

TINY = dict(
    image_size=8, out_channels=3, num_classes=3, patch_size=2, conv_channels=16, num_res_blocks=1, width=16, depth=2,
    num_heads=2, embed_dim=8, norm_groups=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs():
    x_t = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    return x_t, jnp.array([-9.0, -1.0, 2.0, 9.0]), {"y": jnp.array([0, 1, 2, 3])}  # the last label means none


@pytest.fixture(scope="module")
def params():
    """Weights without the zeros of a fresh network, through which nothing would flow."""
    rng, shapes = np.random.default_rng(0), abstract_params(make_network(UViT, **TINY))
    return {name: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32) for name, leaf in shapes.items()}


@pytest.fixture(scope="module")
def out(params, inputs):
    return xla.jit(make_network(UViT, **TINY).apply)(params, *inputs)


def test_the_cheap_recipes_network_has_as_many_parameters_as_it_says():
    shapes = abstract_params(make_network(UViT, image_size=64, out_channels=3, num_classes=101))
    assert sum(leaf.size for leaf in shapes.values()) == 10_854_640
    assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype(jnp.float32)}


def test_a_fresh_network_says_nothing(inputs):
    network = make_network(UViT, **TINY)
    np.testing.assert_array_equal(xla.jit(network.apply)(network.init(jax.random.key(0)), *inputs), 0)


def test_image_time_and_label_matter(params, inputs, out):
    x_t, t, cond = inputs
    apply = xla.jit(make_network(UViT, **TINY).apply)
    others = [(x_t + 0.1, t, cond), (x_t, t + 0.5, cond), (x_t, t, {"y": (cond["y"] + 1) % 4})]
    for changed in others:
        assert (jnp.abs(apply(params, *changed) - out).max(axis=(1, 2, 3)) > 1e-4).all()


def test_every_parameter_has_a_gradient(params, inputs):
    network = make_network(UViT, **TINY)
    gradients = xla.jit(jax.grad(lambda params: (network.apply(params, *inputs) ** 2).sum()))(params)
    assert all(jnp.abs(gradient).max() > 0 for gradient in gradients.values())


def test_batch_splits_give_the_same_output(params, inputs, out):
    apply = xla.jit(make_network(UViT, **TINY).apply)
    halves = [apply(params, *jax.tree.map(lambda value, i=i: value[2 * i : 2 * i + 2], inputs)) for i in (0, 1)]
    np.testing.assert_allclose(np.concatenate(halves), out, atol=1e-5)


def test_a_patch_becomes_the_channels_of_one_position():
    x = jnp.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    deep = space_to_depth(x, 2)
    assert deep.shape == (2, 2, 2, 12)
    np.testing.assert_array_equal(deep[0, 1, 0], x[0, 2:4, 0:2].reshape(-1))
    np.testing.assert_array_equal(depth_to_space(deep, 2), x)


def test_queries_and_keys_have_a_root_mean_square_of_one():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 16)), jnp.float32)
    np.testing.assert_allclose((unit_rms(7 * x) ** 2).mean(-1), 1, rtol=1e-4)


def test_bfloat16_is_near_float32(params, inputs, out):
    low = xla.jit(make_network(UViT, **TINY, dtype=jnp.bfloat16).apply)(params, *inputs)
    assert low.dtype == jnp.float32
    assert 0 < jnp.abs(low - out).max() < 0.1 * jnp.abs(out).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=10), "image_size 10 is not a multiple of twice the patch_size 2"),
        (dict(num_heads=3), "width 16 cannot be divided among 3 attention heads"),
        (dict(conv_channels=18), "18 channels cannot be normalised in 4 groups"),
        (dict(depth=0), "depth is 0, expected at least 1"),
        (dict(num_classes=0), "num_classes is 0, expected at least 1"),
    ],
)
def test_refuses_architectures_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        make_network(UViT, **(TINY | change))


@pytest.mark.parametrize(("classes", "cond", "message"), [(3, {}, "needs labels"), (None, {"y": 0}, "takes no labels")])
def test_labels_exactly_when_conditional(classes, cond, message):
    network = make_network(UViT, **(TINY | dict(num_classes=classes)))
    cond = {name: jnp.array([value]) for name, value in cond.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.apply, abstract_params(network), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), cond)
