import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fooddiff import xla
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.unet import Downsample, GroupNorm, UNet, Upsample, attention, timestep_embedding

TINY = dict(
    image_size=8,
    out_channels=6,
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_heads=2,
    num_classes=3,
)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    return (
        rng.normal(size=(4, 8, 8, 3)).astype(np.float32),
        jnp.array([0.0, 5.0, 250.5, 999.0]),
        {"y": jnp.array([0, 1, 2, 0])},
    )


@pytest.fixture(scope="module")
def params():
    """Weights without the zeros of a fresh network, through which nothing would flow."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(make_network(UNet, **TINY))
    return {name: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32) for name, leaf in shapes.items()}


@pytest.fixture(scope="module")
def out(params, inputs):
    return xla.jit(make_network(UNet, **TINY).apply)(params, *inputs)


def test_batch_splits_give_the_same_output(params, inputs, out):
    assert out.shape == (4, 8, 8, 6)
    assert out.dtype == jnp.float32
    assert (jnp.abs(out).max(axis=(1, 2, 3)) > 0.1).all()
    apply = xla.jit(make_network(UNet, **TINY).apply)
    halves = [apply(params, *jax.tree.map(lambda value, i=i: value[2 * i : 2 * i + 2], inputs)) for i in (0, 1)]
    np.testing.assert_allclose(jnp.concatenate(halves), out, atol=1e-5)


def test_time_and_label_matter(params, inputs, out):
    x_t, t, cond = inputs
    apply = xla.jit(make_network(UNet, **TINY).apply)
    later, relabelled = apply(params, x_t, t + 0.5, cond), apply(params, x_t, t, {"y": (cond["y"] + 1) % 3})
    assert (jnp.abs(later - out).max(axis=(1, 2, 3)) > 1e-4).all()
    assert (jnp.abs(relabelled - out).max(axis=(1, 2, 3)) > 1e-4).all()


def test_dropout_needs_a_key(params, inputs, out):
    apply = xla.jit(make_network(UNet, **TINY, dropout=0.5).apply)
    np.testing.assert_allclose(apply(params, *inputs), out, atol=1e-6)
    a, again, b = (apply(params, *inputs, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert jnp.abs(a - b).max() > 1e-3
    assert jnp.abs(a - out).max() > 1e-3


@pytest.mark.slow
def test_remat_gives_the_same_gradients(params, inputs):
    def gradients(**options):
        network = make_network(UNet, **TINY, **options)
        return xla.jit(jax.grad(lambda params: (network.apply(params, *inputs) ** 2).sum()))(params)

    plain, rematerialised = gradients(), gradients(remat=True)
    for name, value in plain.items():
        scale = float(jnp.abs(value).max()) + 1e-3
        np.testing.assert_allclose(rematerialised[name], value, atol=1e-4 * scale, err_msg=name)


def test_bfloat16_is_near_float32(params, inputs, out):
    low = xla.jit(make_network(UNet, **TINY, dtype=jnp.bfloat16).apply)(params, *inputs)
    assert low.dtype == jnp.float32
    error = jnp.abs(low - out).max() / jnp.abs(out).max()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention_resolutions=(16, 8)), r"attention_resolutions \[16\] never occur.*\[8\]"),
        (dict(image_size=6, channel_mult=(1, 1, 1), attention_resolutions=()), "image_size 6 cannot be halved 2 times"),
        (dict(model_channels=48), "48 channels cannot be normalised in 32 groups"),
        (dict(num_heads=5), "32 channels cannot be divided among 5 attention heads"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_refuses_architectures_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        make_network(UNet, **(TINY | change))


@pytest.mark.parametrize(("classes", "y", "message"), [(3, None, "needs labels"), (None, 0, "takes no labels")])
def test_labels_exactly_when_conditional(classes, y, message):
    network = make_network(UNet, **(TINY | dict(num_classes=classes)))
    x_t, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    cond = {} if y is None else {"y": jnp.array([y])}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.apply, abstract_params(network), x_t, t, cond)


def let_through(layer):
    """A kernel that is 1 in its centre and 0 elsewhere."""
    centre = np.zeros((3, 3, 32, 32), np.float32)
    centre[1, 1] = np.eye(32)
    layer.conv.kernel[...], layer.conv.bias[...] = jnp.asarray(centre), jnp.zeros(32)
    return layer


def test_downsample_is_centred_on_even_pixels():
    """A kernel that is 1 in its centre picks every second pixel from the first on; "SAME" would pick the others."""
    layer = let_through(Downsample(32, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 32)), jnp.float32)
    np.testing.assert_allclose(layer(x), x[:, ::2, ::2], atol=1e-6)


def test_upsample_repeats_pixels():
    layer = let_through(Upsample(32, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 3, 32)), jnp.float32)
    np.testing.assert_allclose(layer(x), x.repeat(2, axis=1).repeat(2, axis=2), atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_group_norm_normalises_each_group_whatever_its_mean(offset):
    x = offset + np.random.default_rng(0).normal(size=(2, 8, 8, 64)).astype(np.float32)
    grouped = np.asarray(GroupNorm(64, 32)(jnp.asarray(x), silu=False)).reshape(2, 64, 32, 2)
    np.testing.assert_allclose(grouped.mean(axis=(1, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(grouped.std(axis=(1, 3)), 1, atol=1e-3)


def test_group_norm_scale_shift_and_silu():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 32)), jnp.float32)
    scale, shift = (jnp.asarray(rng.normal(size=(2, 32)), jnp.float32) for _ in range(2))
    norm = GroupNorm(32, 32)
    expected = norm(x, silu=False) * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(norm(x, scale, shift, silu=False), expected, atol=1e-5)
    np.testing.assert_allclose(norm(x, scale, shift, silu=True), jax.nn.silu(expected), atol=1e-5)


def test_attention_is_a_softmax_per_head():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 3, 4)).astype(np.float32)
    scores = np.einsum("ntmd,nsmd->nmts", q, k) / np.sqrt(4)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    expected = np.einsum("nmts,nsmd->ntmd", weights, v)
    np.testing.assert_allclose(attention(q, k, v), expected, atol=1e-5)
    assert jnp.isfinite(attention(1000 * q, k, v)).all()


def test_timestep_embedding_is_cosines_then_sines():
    t = np.array([0.0, 1.0, 12.5])
    embedding = timestep_embedding(jnp.asarray(t, jnp.float32), 6)
    frequencies = 10_000.0 ** -(np.arange(3) / 3)
    np.testing.assert_allclose(embedding[:, :3], np.cos(t[:, None] * frequencies), atol=1e-5)
    np.testing.assert_allclose(embedding[:, 3:], np.sin(t[:, None] * frequencies), atol=1e-5)
