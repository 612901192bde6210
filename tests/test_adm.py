"""What the settings of guided-diffusion do, and what is refused; the numbers are those of test_golden_adm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.model.classifier import Classifier
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.unet import UNet, double, halve, resize_bilinear

ADM = dict(
    image_size=8,
    out_channels=6,
    model_channels=64,
    channel_mult=(0.5, 1),
    stem_channels=32,
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_heads=1,
    head_channels=16,
    new_attention_order=True,
    resblock_updown=True,
    num_classes=3,
)
CLASSIFIER = dict(
    image_size=8,
    num_classes=5,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=16,
)


def random_params(network, seed=0):
    """Weights without the zeros of a fresh network, through which nothing would flow."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(network)
    return {name: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32) for name, leaf in shapes.items()}


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), jnp.float32)


T = jnp.array([3.0, 700.5])
Y = {"y": jnp.array([2, 0])}


def test_halve_is_a_mean_and_undoes_double(images):
    np.testing.assert_allclose(halve(images)[:, 1, 2], images[:, 2:4, 4:6].mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_array_equal(double(images), images.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_allclose(halve(double(images)), images, atol=1e-6)


def test_resizing_repeats_edges_and_keeps_ramps():
    ramp = jnp.arange(4, dtype=jnp.float32).reshape(1, 1, 4, 1) * jnp.ones((1, 3, 1, 1))
    np.testing.assert_allclose(
        resize_bilinear(ramp, 3, 8)[0, 1, :, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6
    )


@pytest.mark.slow
def test_settings_change_the_layers_that_they_name():
    def names(**change):
        return set(abstract_params(make_network(UNet, **(ADM | change))))

    assert "down.2.layers.0.conv_in.kernel" in names()
    assert "down.2.layers.0.conv.kernel" in names(resblock_updown=False)
    assert not [name for name in names(resblock_updown=False, conv_resample=False) if name.startswith("down.2.")]
    assert abstract_params(make_network(UNet, **ADM))["down.0.layers.0.kernel"].shape == (3, 3, 3, 32)
    assert abstract_params(make_network(UNet, low_res=True, **ADM))["down.0.layers.0.kernel"].shape == (3, 3, 6, 32)


@pytest.mark.slow
def test_resampling_without_parameters_is_a_network_too(images):
    network = make_network(UNet, **(ADM | dict(resblock_updown=False, conv_resample=False)))
    assert xla.jit(network.apply)(random_params(network), images, T, Y).shape == (2, 8, 8, 6)


@pytest.mark.slow
def test_the_attention_order_is_a_permutation_of_channels(images):
    """[head, qkv, channel] and [qkv, head, channel] of the same numbers give the same output."""
    heads, d = 4, 16
    old, new = (make_network(UNet, **(ADM | dict(new_attention_order=order))) for order in (False, True))
    params = random_params(new)
    permuted = {
        name: jnp.swapaxes(value.reshape(*value.shape[:-1], 3, heads, d), -3, -2).reshape(value.shape)
        if ".qkv." in name
        else value
        for name, value in params.items()
    }
    expected = xla.jit(new.apply)(params, images, T, Y)
    np.testing.assert_allclose(xla.jit(old.apply)(permuted, images, T, Y), expected, atol=1e-5)
    assert jnp.abs(xla.jit(old.apply)(params, images, T, Y) - expected).max() > 1e-4


@pytest.mark.slow
def test_low_res_is_seen_at_any_size(images):
    network = make_network(UNet, low_res=True, **ADM)
    params = random_params(network)
    apply = xla.jit(network.apply)
    small = images[:, :4, :4]
    out = apply(params, images, T, Y | {"low_res": small})
    assert jnp.abs(apply(params, images, T, Y | {"low_res": small + 0.1}) - out).max() > 1e-3
    upsampled = resize_bilinear(small, 8, 8)
    np.testing.assert_allclose(apply(params, images, T, Y | {"low_res": upsampled}), out, atol=1e-5)


@pytest.mark.parametrize(
    ("low_res", "cond", "message"),
    [
        (True, Y, r'needs a low-resolution image, cond\["low_res"\]'),
        (True, {"low_res": jnp.zeros((2, 4, 4, 3))}, "a class-conditional network needs labels"),
        (True, Y | {"low_res": jnp.zeros((2, 4, 4, 1))}, r"has 1 channels, expected those of x_t, 3"),
        (False, Y | {"low_res": jnp.zeros((2, 4, 4, 3))}, r'without low_res takes no cond\["low_res"\]'),
    ],
)
def test_conditions_exactly_as_built_for(images, low_res, cond, message):
    network = make_network(UNet, low_res=low_res, **ADM)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.apply, abstract_params(network), images, T, cond)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(head_channels=24), "64 channels cannot be divided into attention heads of 24 channels"),
        (dict(channel_mult=(0.3, 1)), r"channel_mult 0.3 times model_channels 64 is 19.\d* channels, expected a whole"),
        (dict(channel_mult=(0, 1)), "expected a whole number of at least 1"),
        (dict(channel_mult=()), "channel_mult is empty"),
        (dict(stem_channels=0), "stem_channels is 0, expected at least 1"),
        (dict(num_heads_upsample=0), "num_heads_upsample is 0, expected at least 1"),
        (dict(stem_channels=48), "48 channels cannot be normalised in 32 groups"),
    ],
)
def test_refuses_networks_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        make_network(UNet, **(ADM | change))


# The classifier


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["attention", "adaptive"])
def test_a_classifier_uses_every_parameter(images, pool):
    network = make_network(Classifier, pool=pool, **CLASSIFIER)
    params = random_params(network)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(jnp.float32)}

    def log_prob(params, images):
        return jax.nn.log_softmax(network.apply(params, images, T))[:, 1].sum()

    gradients, of_images = xla.jit(jax.grad(log_prob, argnums=(0, 1)))(params, images)
    assert jnp.abs(of_images).max() > 0
    assert not [name for name, gradient in gradients.items() if not jnp.abs(gradient).max() > 0]


@pytest.mark.parametrize("pool", ["attention", "adaptive"])
def test_examples_do_not_see_each_other(images, pool):
    network = make_network(Classifier, pool=pool, **CLASSIFIER)
    params, apply = random_params(network), xla.jit(network.apply)
    logits = apply(params, images, T)
    assert logits.shape == (2, 5)
    np.testing.assert_allclose(apply(params, images[1:], T[1:]), logits[1:], atol=1e-5)
    assert jnp.abs(apply(params, images, T + 50) - logits).max() > 1e-5


@pytest.mark.slow
def test_pooled_features_are_what_the_mean_pool_reads(images):
    network = make_network(Classifier, **CLASSIFIER, pool="adaptive")
    params = random_params(network)
    logits, pooled = network.apply(params, images, T, method=Classifier.read)
    assert pooled.shape == (2, 64)
    np.testing.assert_array_equal(network.apply(params, images, T), logits)
    expected = pooled @ params["pool.logits.kernel"] + params["pool.logits.bias"][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_classifiers_options(images):
    params = random_params(make_network(Classifier, **CLASSIFIER))
    plain = xla.jit(make_network(Classifier, **CLASSIFIER).apply)(params, images, T)
    low = xla.jit(make_network(Classifier, dtype=jnp.bfloat16, **CLASSIFIER).apply)(params, images, T)
    assert low.dtype == jnp.float32
    assert 1e-7 < jnp.abs(low - plain).max() / jnp.abs(plain).max() < 0.05
    dropping = xla.jit(make_network(Classifier, dropout=0.5, **CLASSIFIER).apply)
    np.testing.assert_allclose(dropping(params, images, T), plain, atol=1e-6)
    one, other = (dropping(params, images, T, dropout_key=jax.random.key(seed)) for seed in (0, 1))
    assert jnp.abs(one - other).max() > 1e-5
    remat = xla.jit(make_network(Classifier, remat=True, **CLASSIFIER).apply)
    np.testing.assert_allclose(remat(params, images, T), plain, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pool="spatial"), "pool is 'spatial', expected 'attention' or 'adaptive'"),
        (dict(head_channels=None), "the attention pool needs head_channels, which is None"),
        (dict(head_channels=48), "64 channels cannot be divided into attention heads of 48"),
        (dict(num_classes=0), "num_classes is 0, expected at least 1"),
        (dict(attention_resolutions=(16,)), r"attention_resolutions \[16\] never occur"),
    ],
)
def test_refuses_classifiers_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        make_network(Classifier, **(CLASSIFIER | change))


def test_refuses_images_of_another_size(images):
    network = make_network(Classifier, **CLASSIFIER)
    with pytest.raises(ValueError, match="of another size: they arrive at its pool as 2x2, expected 4x4"):
        jax.eval_shape(network.apply, abstract_params(network), images[:, :4, :4], T)
