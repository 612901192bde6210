import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import build
from fooddiff.sample.generate import draw_batches, sample_ids
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import ConfigError
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build.make_diffusion_model(tiny.config(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def params(model):
    """Random weights; the zero-initialised layers are filled, too, so that the network matters."""
    params = model.network.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    return {
        name: value + 0.1 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }


def mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])


def draw(model, params, ids, *, devices=1, batch_size=4, seed=0, **settings):
    compiled = build.make_sampler(model, mesh(devices), SamplerSpec(**settings))
    return np.concatenate(list(draw_batches(compiled, params, jax.random.key(seed), ids, batch_size)))


def assert_same_pixels(a, b):
    """Equal up to float rounding, which may tip a value over to the next grey level."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_company(model, params):
    ids = sample_ids([3, 1, 7], 3)
    whole = draw(model, params, ids, batch_size=9)
    assert whole.shape == (9, 8, 8, 3)
    assert whole.dtype == np.uint8
    assert_same_pixels(whole, draw(model, params, ids, batch_size=4))
    assert_same_pixels(whole[3:6], draw(model, params, sample_ids([1], 3), batch_size=1))
    assert_same_pixels(whole[::-1], draw(model, params, ids[::-1], batch_size=9))


@pytest.mark.slow
def test_a_sample_does_not_depend_on_the_device_count(model, params):
    ids = sample_ids([3, 1], 2)
    assert_same_pixels(draw(model, params, ids, devices=1), draw(model, params, ids, devices=2))


def test_the_same_batch_is_the_same_to_the_bit(model, params):
    ids = sample_ids([3, 1], 2)
    np.testing.assert_array_equal(draw(model, params, ids), draw(model, params, ids))


def test_seed_class_and_index_matter(model, params):
    ids = sample_ids([3, 1], 2)
    samples = draw(model, params, ids)
    assert len(np.unique(samples, axis=0)) == 4
    assert (samples != draw(model, params, ids, seed=1)).any()


@pytest.mark.slow
def test_fewer_steps_and_ddim(model, params):
    ids = sample_ids([3], 2)
    few = draw(model, params, ids, sampler="ddim", steps=2)
    assert (few != draw(model, params, ids, sampler="ddim")).any()
    assert (few != draw(model, params, ids, sampler="ddim", steps=2, eta=1.0)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sampler="euler"), "expected one of ancestral, ddim"),
        (dict(steps=1), "expected 2 to 4"),
        (dict(steps=5), "expected 2 to 4"),
        (dict(sampler="ddim", eta=1.5), r"expected a number in \[0, 1\]"),
        (dict(eta=0.5), "only the samplers 'ddim' and 'heun'"),
    ],
)
def test_bad_settings_are_named(model, params, settings, message):
    with pytest.raises(ConfigError, match=message):
        draw(model, params, sample_ids([0], 1), **settings)


def test_unconditional(tmp_path):
    config = tiny.config(tmp_path)
    with config.unlocked():
        config.model.num_classes = None
    model = build.make_diffusion_model(config)
    params = model.network.init(jax.random.key(0))
    assert "label.embedding" not in params
    assert draw(model, params, sample_ids([0], 3)).shape == (3, 8, 8, 3)
    assert jnp.isfinite(params["conv_out.kernel"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(sampler="heun", steps=3, spacing="log_snr"),
        dict(sampler="ddim", eta=0.5),
        dict(sampler="dpmpp_2m", steps=3),
        dict(sampler="sde_dpmpp_2m"),
    ],
)
def test_step_by_step_the_images_are_the_same(model, params, settings):
    ids, key, spec = sample_ids([3, 1], 2), jax.random.key(0), SamplerSpec(**settings)
    stepper = build.make_stepwise_sampler(model, mesh(2), spec)
    descent = stepper.begin(key, ids)
    steps = model.steps(spec)
    for i in range(len(steps.remaining)):
        here = jax.tree.map(lambda field: field[i : i + 1], steps)  # noqa: B023
        descent = stepper.advance(params, key, ids, descent, here, 1.0)
    assert_same_pixels(np.asarray(stepper.decode(params, descent.x_t)), draw(model, params, ids, devices=2, **settings))
