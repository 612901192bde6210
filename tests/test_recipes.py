"""Continuous time, guidance and file exports on a tiny model, from config to pixels, as a user combines them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import fooddiff
from configs import food101_cheap
from fooddiff import build, parallel
from fooddiff.api import Model
from fooddiff.arrays import Batch
from fooddiff.commands.convert import main as convert
from fooddiff.convert.card import model_card
from fooddiff.convert.exporting import write_safetensors
from fooddiff.model.network import abstract_params
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.fine_tune import starting_weights
from fooddiff.runs.load import TrainedModel
from fooddiff.runs.weights_file import read_weights, write_weights
from fooddiff.sample.generate import draw_batches, sample_ids
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import ConfigError
from fooddiff.xla import jit
from tests import tiny

SPEC = SamplerSpec(steps=3, spacing="log_snr")


def continuous(folder, **overrides):
    """The tiny model in continuous time, with a null label."""
    config = tiny.config(folder)
    with config.unlocked():
        config.diffusion = ConfigDict(
            dict(time="continuous", schedule="cosine", prediction="x_0", log_snr_range=(-9.0, 9.0))
        )
        config.objective = ConfigDict(
            dict(name="weighted", weight="capped", weight_options={"cap": 5.0}, density="stratified", label_dropout=0.5)
        )
        config.model.null_label = True
        config.sample.steps, config.sample.spacing = 3, "log_snr"
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


def batch(n=4):
    rng = np.random.default_rng(0)
    return Batch(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), {"y": rng.integers(0, 10, n, dtype=np.int32)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(training, state) after four steps: until then, layers that start at zero let nothing through."""
    training = build.make_training(continuous(tmp_path_factory.mktemp("continuous")), parallel.make_mesh())
    key = jax.device_put(jax.random.key(0), training.replicated)
    state, step = build.first_state(training, key, {}), jit(training.step, out_shardings=training.state_sharding)
    for _ in range(4):
        state = step(state, jax.device_put(batch(), training.over_data), key)
    return training, state


def draw(trained, spec, params=None):
    training, state = trained
    compiled = build.make_sampler(training.model, parallel.make_mesh(), spec)
    params = state.params if params is None else params
    return np.concatenate(list(draw_batches(compiled, params, jax.random.key(0), sample_ids([3, 1], 2), 4)))


@pytest.mark.slow
def test_training_in_continuous_time_reports_the_loss_by_log_snr(trained):
    _, state = trained
    sums = jax.device_get(state.sums)
    bins = [name for name in sums if name.startswith("loss_log_snr_")]
    assert len(bins) == 8
    assert sum(sums[name][1] for name in bins) == sums["loss"][1] == 16  # every example is in one bin
    np.testing.assert_allclose(sum(sums[name][0] for name in bins), sums["loss"][0], rtol=1e-5)
    assert np.isfinite(sums["x0_mse"]).all()


@pytest.mark.slow
def test_dropped_labels_reach_the_null_row_alone(trained):
    """With half of the labels hidden, training has moved the embedding of the null label and of seen classes."""
    training, state = trained
    before = build.first_state(training, jax.device_put(jax.random.key(0), training.replicated), {}).params
    moved = np.abs(np.asarray(state.params["label.embedding"]) - before["label.embedding"]).max(axis=1) > 0
    seen = set(batch().cond["y"].tolist())
    assert len(moved) == 11
    assert moved[10]
    assert not any(moved[y] for y in range(10) if y not in seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(sampler="dpmpp_2m", spacing="karras"),
        dict(sampler="ddim", eta=0.5),
        dict(sampler="sde_dpmpp_2m", spacing="time"),
        dict(sampler="heun", eta=1.0),
    ],
)
def test_every_sampler_draws_in_continuous_time(trained, changes):
    images = draw(trained, SamplerSpec(**(dict(steps=3, spacing="log_snr") | changes)))
    assert images.shape == (4, 8, 8, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 4


@pytest.mark.slow
def test_guidance_moves_samples_where_labels_matter_and_only_there(trained):
    params = dict(trained[1].params)
    key = jax.random.key(3)
    params["label.embedding"] = jax.random.normal(key, params["label.embedding"].shape)
    params["conv_out.kernel"] = 0.1 * jax.random.normal(jax.random.key(4), params["conv_out.kernel"].shape)
    plain = draw(trained, SPEC, params)
    strong = draw(trained, SamplerSpec(steps=3, spacing="log_snr", guidance=4.0), params)
    nowhere = draw(trained, SamplerSpec(steps=3, spacing="log_snr", guidance=4.0, interval=(20.0, 30.0)), params)
    assert (plain != strong).any()
    np.testing.assert_array_equal(plain, nowhere)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=None), "at least 2"),
        (dict(spacing="even"), "expected one of time, log_snr, karras"),
        (dict(guidance=-1.0), "guidance >= 0"),
        (dict(guidance=2.0, rescale=1.5), r"rescale in \[0, 1\]"),
        (dict(guidance=2.0, interval=(4.0, -4.0)), "two ascending log SNRs"),
    ],
)
def test_bad_specs_are_named(tmp_path, changes, message):
    model = build.make_diffusion_model(continuous(tmp_path))
    with pytest.raises(ConfigError, match=message):
        build.make_sampler(model, parallel.make_mesh(), SamplerSpec(**(dict(steps=3, spacing="log_snr") | changes)))


def test_a_scale_of_one_is_no_guidance_whatever_the_config_says_of_it():
    settings = {"steps": 50, "guidance": 3.0, "interval": (-4.0, 4.0), "rescale": 0.5}
    assert build.sampler_spec(settings).interval == (-4.0, 4.0)
    assert build.sampler_spec(settings, guidance=1.0) == SamplerSpec(steps=50)


@pytest.mark.parametrize(
    ("num_classes", "message"), [(10, "knows no null label"), (None, "knows no classes to be guided to")]
)
def test_guidance_needs_a_null_label(tmp_path, num_classes, message):
    model = build.make_diffusion_model(tiny.config(tmp_path, model__num_classes=num_classes))
    with pytest.raises(ConfigError, match=message):
        build.make_sampler(model, parallel.make_mesh(), SamplerSpec(guidance=2.0))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective__weight", "snr5", "expected one of constant, snr, min_snr"),
        ("objective__density", "even", "expected one of uniform, stratified"),
        ("objective__weight_options", {"k": 1.0}, "has no field k; its fields are cap"),
        ("objective__weight_options", {"cap": -5.0}, "sets cap to -5.0, expected more than 0"),
        ("objective__name", "mse", "expected one of weighted"),
        ("diffusion__log_snr_range", (3.0, 1.0), "two ascending numbers"),
        ("ema__power_lengths", (0.5,), "power_lengths has 0.5"),
    ],
)
def test_bad_values_in_continuous_time_are_named(tmp_path, field, value, message):
    config = continuous(tmp_path)
    section, name = field.split("__")
    with config.unlocked():
        config[section][name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        build.make_training(config, parallel.make_mesh())


def test_a_negative_weight_decay_is_named():
    config = food101_cheap.get_config()
    config.optimizer.weight_decay = -0.5
    with pytest.raises(ConfigError, match=r"weight_decay is -0.5, expected 0 or more"):
        build.make_optimizer(config)


def test_a_spec_has_a_name_that_tells_it_apart():
    assert SamplerSpec().name == "ancestral-all"
    spec = SamplerSpec(sampler="heun", steps=20, guidance=3.0, interval=(-4.0, 4.0))
    assert spec.name == "heun-20_guidance3_interval-4to4"
    assert spec.title == "heun, 20 steps, guidance 3, interval -4 to 4"
    assert SamplerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    written = build.sampler_spec({"sampler": "heun", "steps": 20, "guidance": 3, "interval": [-4, 4]})  # no points
    assert json.dumps(written.to_json()) == json.dumps(spec.to_json())


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = continuous(folder)
    meta = {"config": json.loads(json.dumps(config.to_dict())), "class_names": [str(y) for y in range(10)]}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(trained[1], meta)
        checkpoints.wait()
    return folder


@pytest.mark.slow
def test_the_python_api_draws_what_the_compiled_sampler_draws(trained, workdir):
    model = fooddiff.load(workdir, weights="raw")
    assert model.class_names == tuple("0123456789")
    np.testing.assert_array_equal(model.sample(classes=["3", "1"], per_class=2), draw(trained, SPEC))
    with pytest.raises(ValueError, match="no class 'pizza'"):
        model.sample(classes=["pizza"])
    with pytest.raises(ValueError, match="per_class is 0"):
        model.sample(per_class=0)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "off"), [([], 0), (["--half"], 1)])
def test_an_exported_file_is_a_model(workdir, tmp_path, flags, off):
    file = tmp_path / "model.safetensors"
    convert(["export", f"--workdir={workdir}", "--weights=raw", f"--out={file}", *flags])
    ours, theirs = (
        fooddiff.load(path, weights="raw").sample(classes=["3"], per_class=2).astype(int) for path in (file, workdir)
    )
    assert np.abs(ours - theirs).max() <= off
    about = read_weights(file).about
    assert (about["step"], about["images_seen"], about["weights"]) == (4, 16, "raw")
    assert str(workdir.parent) not in str(about)
    with pytest.raises(ValueError, match="holds the weights raw of step 4"):
        fooddiff.load(file, weights="ema_0.5")


def test_a_card_and_a_file_say_which_weights_training_began_with(tmp_path):
    first = another(tmp_path, 3).trained
    second = first._replace(
        step=4, meta={"origin": starting_weights(first, first.config, first.class_names, first.params)[1]}
    )
    second.meta["origin"]["workdir"] = str(tmp_path)
    assert (first.images_seen, second.images_seen) == (12, 28)
    file = tmp_path / "second.safetensors"
    write_safetensors(file, second.params, second)
    third = fooddiff.load(file, weights="raw").trained
    assert (third.images_seen, third.meta["origin"]["images_seen"]) == (28, 12)
    assert str(tmp_path) not in str(third.meta["origin"])
    for each in (second, third):
        card = model_card(each, name="it", library="fooddiff", use="", workdir=file)
        assert "4 steps of 4 images, beginning with the weights `raw` of step 3 of another run: 28 images" in card


def another(tmp_path, seed, **overrides):
    """A model with random weights."""
    config = continuous(tmp_path, **overrides)
    model = build.make_diffusion_model(config)
    classes = tuple("0123456789")
    random = {
        name: 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), leaf.shape)
        for i, (name, leaf) in enumerate(abstract_params(model.network).items())
    }
    mesh = parallel.make_mesh()
    random = jax.device_put(random, parallel.replicated(mesh))
    return Model(TrainedModel(config, model, classes, random, seed, "raw", {}), mesh)


@pytest.mark.slow
def test_another_model_is_a_guide(workdir, tmp_path):
    model, choice = fooddiff.load(workdir, weights="raw"), dict(classes=["3"], per_class=2)
    plain = model.sample(**choice, guidance=1.0).astype(int)
    by_itself = model.sample(**choice, guidance=3.0, guide=model).astype(int)
    assert np.abs(plain - by_itself).max() <= 1
    narrow, other = (another(tmp_path, seed, model__model_channels=32, model__null_label=False) for seed in (1, 2))
    guided, otherwise = (model.sample(**choice, guidance=3.0, guide=guide) for guide in (narrow, other))
    assert (guided != plain).any()
    assert (guided != otherwise).any()
    assert len(model._compiled) == 3  # the guide's weights are an argument of the program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (dict(data__image_size=16), "Its image size: 16; this model's: 8"),
        (dict(diffusion__schedule="linear"), "Its process: .*schedule linear.*; this model's: .*schedule cosine"),
        (dict(model__num_classes=11), r"Its classes: 11 \(0, 1, 2, \.\.\.\); this model's: 10 \("),
    ],
)
def test_what_cannot_be_a_guide_is_named(workdir, tmp_path, difference, message):
    model, guide = fooddiff.load(workdir, weights="raw"), another(tmp_path, 1, **difference)
    if "model__num_classes" in difference:
        guide = replace(guide, trained=guide.trained._replace(class_names=(*guide.class_names, "10")))
    with pytest.raises(ValueError, match=message):
        model.sample(guidance=3.0, guide=guide)


@pytest.mark.slow
def test_a_guide_needs_a_scale(workdir):
    model = fooddiff.load(workdir, weights="raw")
    with pytest.raises(ValueError, match="a guide is given, but guidance is 1, which is off"):
        model.sample(guidance=1.0, guide=model)


def test_a_file_of_a_later_format_is_refused(tmp_path):
    file = tmp_path / "later.safetensors"
    about = {"config": {}, "class_names": [], "step": 1, "weights": "raw", "images_seen": 1, "format": 99}
    write_weights(file, {"w": jnp.zeros(2)}, about, half=False)
    with pytest.raises(ValueError, match="format 99"):
        read_weights(file)
    with pytest.raises(FileNotFoundError, match="no run in"):
        fooddiff.load(tmp_path / "nothing")


@pytest.mark.parametrize("part", [b"pizza", np.float32(0.7).tobytes()])
def test_a_flipped_bit_of_a_file_of_weights_is_noticed(tmp_path, part):
    file = tmp_path / "flipped.safetensors"
    about = {"config": {}, "class_names": ["pizza"], "step": 1, "weights": "raw", "images_seen": 1}
    write_weights(file, {"w": np.full(2, 0.7)}, about, half=False)
    data = bytearray(file.read_bytes())
    data[data.index(part)] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="not those that were written"):
        read_weights(file)


def test_a_file_of_weights_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    file = tmp_path / "model.safetensors"
    about = {"config": {}, "class_names": [], "step": 1, "weights": "raw", "images_seen": 1}
    write_weights(file, {"w": np.zeros(2)}, about, half=False)
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
