"""Every file in configs/ builds: init, step and sampling are traced without allocating anything."""

import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fooddiff import build, parallel
from fooddiff.commands import train
from fooddiff.model.network import abstract_params

NAMES = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_init_step_and_sample_fit_together(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    mesh = parallel.make_mesh()
    training = build.make_training(config, mesh)
    model, state = training.model, training.abstract_state
    assert build.task_of(config) in train.ACTIONS
    key = jax.eval_shape(lambda: jax.random.key(0))
    after = jax.eval_shape(training.step, *build.abstract_step_arguments(config, training))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    if "sample" not in config:
        return
    sample = config.sample
    generate = build.make_sampler(model, mesh, build.sampler_spec(sample))
    ids = jax.ShapeDtypeStruct((sample.batch_size, 2), jnp.int32)
    small = model.low_res and jax.ShapeDtypeStruct((sample.batch_size, *2 * (model.low_res.size,), 3), jnp.uint8)
    given = () if small is None else (small,)
    images = jax.eval_shape(generate, {**state.params, **model.codec.tensors}, key, ids, *given)
    assert images.shape == (sample.batch_size, config.data.image_size, config.data.image_size, 3)
    assert images.dtype == jnp.uint8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("autoencoder", "vq"),
        ("autoencoder", "adversarial"),
        ("latent", "sd"),
        ("latent", "taef2"),
        ("latent", "gpu256"),
        ("superres", "32"),
    ],
)
def test_variants_build(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    training = build.make_training(config, parallel.make_mesh())
    jax.eval_shape(training.step, *build.abstract_step_arguments(config, training))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), [("hybrid", 92_080_902), ("mse", 92_077_443)])
def test_parameter_counts_of_the_reports_models(name, parameters):
    model = build.make_diffusion_model(importlib.import_module(f"configs.{name}").get_config())
    assert sum(math.prod(leaf.shape) for leaf in abstract_params(model.network).values()) == parameters


def test_the_bounds_weight_follows_the_number_of_timesteps():
    config = importlib.import_module("configs.hybrid").get_config()
    assert config.objective.vb_weight == 0.2
    config.diffusion.timesteps = 1000
    assert config.objective.vb_weight == 1.0


def test_the_tiny_experiment_differs_only_in_the_objective():
    tiny = importlib.import_module("configs.food101_tiny")
    hybrid, mse = (dict(tiny.get_config(objective).to_dict()) for objective in ("hybrid", "mse"))
    assert {section for section in hybrid if hybrid[section] != mse[section]} == {"diffusion", "objective"}
    with pytest.raises(ValueError, match="hybrid or mse, got 'l2'"):
        tiny.get_config("l2")


@pytest.mark.parametrize(
    ("name", "message"),
    [("superres", "the size 16 or 32, got '8'"), ("adm", r"the name of a released file, 64x64_diffusion, .*, got '8'")],
)
def test_variants_that_do_not_exist_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        importlib.import_module(f"configs.{name}").get_config("8")
