"""Bad config values are refused with an error that names the value and what is allowed."""

from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from fooddiff import build, parallel
from fooddiff.settings import ConfigError
from tests import tiny


def build_all(config):
    build.make_training(config, parallel.make_mesh())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("diffusion__timesteps", 1, "at least 2 timesteps, got 1"),
        ("diffusion__schedule", "sine", "config.diffusion.schedule is 'sine', expected one of linear, cosine"),
        ("diffusion__prediction", "noise", "expected one of eps, x_0, v, flow, edm"),
        ("diffusion__prediction", "flow", "is 'flow', expected one of eps, x_0, v"),
        ("diffusion__time", "ordinary", "expected one of discrete, continuous"),
        ("model__network", "vit", "expected one of unet, uvit"),
        ("optimizer__name", "sgd", "expected one of adam, adamw, muon"),
        ("objective__label_dropout", 0.1, "only for a network that knows a null label"),
        ("diffusion__variance", "learned", "expected one of fixed_small, fixed_large, learned_range"),
        ("diffusion__variance", "fixed_large", "expected 'learned_range'"),
        ("objective__name", "l1", "expected one of mse, hybrid, vlb"),
        ("objective__name", "mse", "config.objective has no field vb_weight"),
        ("objective__timestep_sampling", "loss", "expected one of uniform, loss_second_moment"),
        ("model__attention_resolutions", (16,), r"attention_resolutions \[16\] never occur .* sizes \[8\]"),
        ("model__channel_mult", (1, 1, 1, 1, 1), "image_size 8 cannot be halved 4 times"),
        ("model__model_channels", 48, "48 channels cannot be normalised in 32 groups"),
        ("model__model_channels", 33, "model_channels is 33, expected an even number"),
        ("model__num_heads", 5, "cannot be divided among 5 attention heads"),
        ("model__dtype", "float16", "expected one of float32, bfloat16"),
        ("model__dropout", 1.0, r"dropout must be in \[0, 1\), got 1.0"),
        ("optimizer__lr", -1.0, "lr is -1.0, expected a positive"),
        ("optimizer__b1", 1.0, "b1 is 1.0"),
        ("objective__vb_weight", -1.0, "vb_weight is -1.0, expected 0 or more"),
        ("optimizer__warmup_steps", -1, "warmup_steps is -1"),
        ("optimizer__cooldown_steps", 5, "config.optimizer.cooldown_steps is 5, expected at most config.train.steps 4"),
        ("optimizer__anneal_steps", 0, "config.optimizer.anneal_steps is 0, expected at least 1"),
        ("optimizer__clip_norm", 0.0, "clip_norm is 0.0"),
        ("ema__rates", (1.0,), r"config.ema.rates has 1.0"),
        ("train__steps", 0, "config.train.steps is 0, expected at least 1"),
        ("train__batch_size", 3, "batch_size 3 cannot be divided among 2 devices"),
        ("train__accumulate", 3, "expected a multiple of 6"),
        ("train__shard", "ema", "config.train.shard is 'ema', expected one of nothing, averages, all"),
    ],
)
def test_bad_values_are_named(tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        build_all(tiny.config(tmp_path, **{field: value}))


def test_unknown_and_missing_fields_are_named(tmp_path):
    config = tiny.config(tmp_path)
    with config.unlocked():
        config.model.num_blocks = 2
    with pytest.raises(ConfigError, match=r"config.model has no field num_blocks; its fields are .*num_res_blocks"):
        build_all(config)
    config = tiny.config(tmp_path)
    with config.unlocked():
        del config.optimizer.lr
    with pytest.raises(ConfigError, match=r"config.optimizer lacks lr"):
        build_all(config)


def test_a_config_without_a_task_trains_diffusion_and_other_tasks_are_named(tmp_path):
    config = tiny.config(tmp_path)
    assert build.task_of(config) == "diffusion"
    with config.unlocked():
        config.task = "painting"
    with pytest.raises(
        ConfigError, match=r"config.task is 'painting', expected one of diffusion, autoencoder, classifier"
    ):
        build_all(config)


@pytest.mark.parametrize("section", ["data", "ema", "train", "sample", "eval", "log", None])
def test_unknown_fields_are_refused_in_every_section(tmp_path, section):
    config = tiny.config(tmp_path)
    with config.unlocked():
        (config if section is None else config[section]).guidence = 3.0
    with pytest.raises(ConfigError, match="has no field guidence; its fields are"):
        build_all(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.accumulate", "config.train lacks accumulate"),
        ("eval.weights", "config.eval lacks weights"),
        ("log", "config lacks log"),
        ("init_from", "config lacks init_from"),
        ("objective.name", "config.objective.name is None, expected one of mse"),
    ],
)
def test_missing_fields_are_named_in_every_section(tmp_path, name, message):
    config = tiny.config(tmp_path)
    *sections, field = name.split(".")
    with config.unlocked():
        del (config[sections[0]] if sections else config)[field]
    with pytest.raises(ConfigError, match=message):
        build_all(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(data__source="food102"), "expected one of food101, archive, folder, digits"),
        (dict(data__path="somewhere"), "digits"),
        (dict(data__image_size=0), "config.data.image_size is 0"),
        (dict(model__num_classes=11), "config.model.num_classes is 11, but digits has 10 classes"),
    ],
)
def test_bad_data_settings_are_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        build.make_dataset(tiny.config(tmp_path, **overrides), "train")


def test_the_mesh_holds_every_device():
    assert parallel.make_mesh().size == jax.device_count() == 2


def test_state_is_divided_along_the_longest_axis_that_can_be():
    mesh = parallel.make_mesh()
    training = build.make_training(tiny.config(Path("unused"), train__shard="averages"), mesh)
    divided = training.state_sharding.ema["0.995"]
    assert divided["down.1.layers.0.conv_in.kernel"].spec == PartitionSpec(None, None, "data")  # 3, 3, 32, 32
    assert divided["down.0.layers.0.kernel"].spec == PartitionSpec(None, None, None, "data")  # 3, 3, 3, 32
    assert {each.spec for each in jax.tree.leaves(training.state_sharding.params)} == {PartitionSpec()}
    assert training.state_sharding.step.spec == PartitionSpec()
