"""What an autoencoder's settings do, and what is refused; the numbers are those of test_golden_ldm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.model.autoencoder import Autoencoder
from fooddiff.model.network import abstract_params, make_network

KL = dict(
    image_size=8,
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    z_channels=3,
    latent_channels=2,
    norm_groups=4,
)
VQ = KL | dict(num_codes=6)


@pytest.fixture(scope="module")
def kl():
    network = make_network(Autoencoder, **KL)
    return network, network.init(jax.random.key(0))


def images(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def both(network):
    """Encodes and decodes the first half of the channels: whole networks in one compiled program."""

    @xla.jit
    def run(params, x, dropout_key=None):
        encoded = network.apply(params, x, method=Autoencoder.encode, dropout_key=dropout_key)
        z = encoded[..., : KL["latent_channels"]]
        return encoded, network.apply(params, z, method=Autoencoder.decode, dropout_key=dropout_key)

    return run


@pytest.mark.parametrize(("settings", "channels"), [(KL, 4), (VQ, 2)])
def test_shapes_also_of_other_sizes(settings, channels):
    network = make_network(Autoencoder, **settings)
    for size in ((8, 8), (12, 4)):
        encoded, decoded = jax.eval_shape(both(network), abstract_params(network), images(2, *size, 3))
        assert encoded.shape == (2, size[0] // 2, size[1] // 2, channels)
        assert decoded.shape == (2, *size, 3)


def test_sizes_that_would_come_back_smaller_are_refused(kl):
    network, params = kl
    with pytest.raises(ValueError, match="images of 8x7 cannot be encoded: expected multiples of 2"):
        network.apply(params, images(1, 8, 7, 3), method=Autoencoder.encode)


def test_the_codebook_starts_within_one_code():
    params = make_network(Autoencoder, **VQ).init(jax.random.key(0))
    assert params["codebook"].shape == (6, 2)
    assert np.abs(params["codebook"]).max() <= 1 / 6
    assert params["codebook"].std() > 0.01
    assert "codebook" not in abstract_params(make_network(Autoencoder, **KL))


def test_attention_is_where_it_is_asked_for_and_in_the_middle():
    def attending(**change):
        names = abstract_params(make_network(Autoencoder, **(KL | change)))
        return {name.rsplit(".", 2)[0] for name in names if name.endswith(".q.kernel")}

    middle = {"encoder.middle.attention", "decoder.middle.attention"}
    assert attending(attention_resolutions=()) == middle
    levels = {"encoder.levels.1.attentions.0", "decoder.levels.1.attentions.0", "decoder.levels.1.attentions.1"}
    assert attending() == middle | levels


@pytest.mark.slow
def test_dropout_follows_its_key_and_nothing_else():
    network = make_network(Autoencoder, **(KL | dict(dropout=0.5)))
    params, run, x = network.init(jax.random.key(0)), both(network), images(1, 8, 8, 3)
    plain, first, again, other = (run(params, x, key) for key in (None, *(jax.random.key(i) for i in (1, 1, 2))))
    for i in range(2):
        np.testing.assert_array_equal(first[i], again[i])
        assert not np.allclose(first[i], other[i])
        assert not np.allclose(first[i], plain[i])


def test_without_dropout_a_key_changes_nothing(kl):
    network, params = kl
    x = images(1, 8, 8, 3)
    for with_key, without in zip(both(network)(params, x, jax.random.key(0)), both(network)(params, x), strict=True):
        np.testing.assert_allclose(with_key, without, atol=1e-6)


@pytest.mark.slow
def test_low_precision_is_close_and_float32_outside(kl):
    network, params = kl
    low = make_network(Autoencoder, **KL, dtype=jnp.bfloat16)
    x = images(2, 8, 8, 3)
    for near, exact in zip(both(low)(params, x), both(network)(params, x), strict=True):
        assert near.dtype == jnp.float32
        assert 0 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=9), "cannot be halved"),
        (dict(channel_mult=()), "channel_mult is empty"),
        (dict(attention_resolutions=(5,)), "never occur"),
        (dict(norm_groups=3), "expected a divisor"),
        (dict(latent_channels=0), "latent_channels is 0"),
        (dict(num_res_blocks=0), "num_res_blocks is 0"),
        (dict(num_codes=0), "num_codes is 0"),
        (dict(dropout=1.0), "dropout must be in"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_network(Autoencoder, **(KL | change))
