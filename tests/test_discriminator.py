"""Laws of the discriminator and its losses; the numbers are those of test_golden_ldm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import xla
from fooddiff.model.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from fooddiff.model.network import abstract_params, make_network

SMALL = dict(channels=4, num_layers=2)


def images(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_widths_and_shapes():
    shapes = {
        name: leaf.shape for name, leaf in abstract_params(make_network(PatchDiscriminator, num_layers=5)).items()
    }
    widths = [shapes[f"convs.{i}.kernel"][-1] for i in range(7)]
    assert widths == [64, 128, 256, 512, 512, 512, 1]
    assert [name for name in shapes if name.startswith("convs") and name.endswith("bias")] == [
        "convs.0.bias",
        "convs.6.bias",
    ]
    network = make_network(PatchDiscriminator)
    assert jax.eval_shape(network.apply, abstract_params(network), images(2, 64, 64, 3)).shape == (2, 6, 6, 1)


def test_a_logit_sees_its_patch_only_but_for_the_statistics():
    """With one norm's statistics as they are, a far pixel changes all logits a little, and its own much more."""
    network = make_network(PatchDiscriminator, **SMALL)
    params = network.init(jax.random.key(0))
    params = {name: 10 * value if name.endswith("kernel") else value for name, value in params.items()}
    x = images(1, 96, 96, 3)
    apply = xla.jit(network.apply)
    change = np.abs(apply(params, x.at[0, 0, 0].add(20)) - apply(params, x))[0, :, :, 0]
    assert change[:5, :5].max() > 10 * change[6:, 6:].max()


def test_hinge_loss_is_zero_beyond_the_margin():
    assert hinge_loss(jnp.array([1.0, 5.0]), jnp.array([-1.0, -2.0])) == 0
    assert hinge_loss(jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0])) == (0.5 + 1.5) / 2
    assert generator_loss(jnp.array([1.0, 2.0])) == -1.5


def test_adaptive_weight_makes_both_pulls_equal():
    a, b = images(3, 3, 4, 3), 7 * images(3, 3, 4, 3)[::-1]
    weight = adaptive_weight(a, b)
    np.testing.assert_allclose(jnp.linalg.norm((weight * b).ravel()), jnp.linalg.norm(a.ravel()), rtol=1e-4)
    assert adaptive_weight(a, 0 * b) == 10_000
    assert adaptive_weight(0 * a, 0 * b) == 0
    np.testing.assert_array_equal(jax.grad(adaptive_weight)(a, b), 0)


@pytest.mark.parametrize("settings", [dict(channels=0), dict(num_layers=0), dict(in_channels=0)])
def test_counts_of_zero_are_refused(settings):
    with pytest.raises(ValueError, match="expected at least 1"):
        make_network(PatchDiscriminator, **settings)


def test_images_smaller_than_a_patch_are_refused():
    network = make_network(PatchDiscriminator, **SMALL)
    assert jax.eval_shape(network.apply, abstract_params(network), images(1, 12, 13, 3)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="images of 11x12 are too small: expected at least 12 pixels"):
        network.apply(network.init(jax.random.key(0)), images(1, 11, 12, 3))
