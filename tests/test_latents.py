"""Diffusion in latents from end to end, on digits of 16 pixels: train, resume, sample, score, export, and refusals."""

import json
import shutil
from collections import OrderedDict
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from safetensors import safe_open

import fooddiff
from fooddiff import build, codec, parallel
from fooddiff.commands import dry_run, likelihood, train
from fooddiff.commands import eval as evaluator
from fooddiff.commands import latents as latents_command
from fooddiff.commands.convert import main as convert
from fooddiff.commands.latents import feed_of
from fooddiff.data import latents as latents_module
from fooddiff.data.latents import load_latents
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.model.autoencoder import Autoencoder
from fooddiff.model.ldm import to_state_dict
from fooddiff.model.network import abstract_params, make_network
from fooddiff.model.taesd import TAESD, to_taesd
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.load import load_trained
from fooddiff.runs.workdir import WorkdirError
from fooddiff.sample.grid import read_grid
from fooddiff.settings import ConfigError
from tests import test_autoencoder_task, test_recipes
from tests.random_stem import random_stem
from tests.test_files_torch_file import Global, of, zip_bytes


@pytest.fixture(scope="module")
def workspace(shared_workspace):
    return shared_workspace


@pytest.fixture(scope="module")
def autoencoder(workspace, once):
    return once("kl", test_autoencoder_task.whole(workspace))


def latent(workspace, autoencoder, **overrides) -> ConfigDict:
    """The tiny model in continuous time, in the latents of an autoencoder: 8x8x2 of 16x16 pixels."""
    config = test_recipes.continuous(workspace, data__image_size=16, data__flip=True)
    with config.unlocked():
        config.codec = ConfigDict(dict(path=str(autoencoder)))
        config.codec.model = test_autoencoder_task.config(workspace).model
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


@pytest.fixture(scope="module")
def trained(workspace, autoencoder, once):
    return once("latent", latent(workspace, autoencoder))


@pytest.mark.slow
def test_a_run_samples_whole_images_without_its_autoencoder(workspace, trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)  # and nothing else
    images = fooddiff.load(moved).sample(classes=["3", "1"], per_class=2)
    assert images.shape == (4, 16, 16, 3)
    assert len(np.unique(images, axis=0)) == 4
    assert (trained / "samples" / "step_0000004_ema_0.995.png").exists()


@pytest.mark.slow
def test_samples_are_decoded_with_the_statistics_of_the_training_set(workspace, autoencoder, trained):
    model = load_trained(trained, step=None, weights="raw", mesh=parallel.make_mesh())
    of_images = load_trained(autoencoder, step=None, weights="ema", mesh=parallel.make_mesh(), task="autoencoder")
    for name, value in of_images.params.items():
        np.testing.assert_array_equal(model.params[codec.PREFIX + name], value)
    pixels = build.make_dataset(model.config, "train").images
    encode = build.make_encode(of_images.model, parallel.make_mesh())
    z = np.stack([encode(of_images.params, side) for side in (pixels[:1200], pixels[:1200, :, ::-1])])
    axes = (0, 1, 2, 3)
    np.testing.assert_allclose(model.params[codec.MEAN], z.mean(axes), atol=0.1 * z.std())
    np.testing.assert_allclose(model.params[codec.STD], z.std(axes), rtol=0.1)


@pytest.mark.slow
def test_the_codec_turns_what_the_cache_holds_to_the_autoencoders_images(workspace, autoencoder, trained):
    config, mesh = latent(workspace, autoencoder), parallel.make_mesh()
    dataset = build.make_dataset(config, "train")
    feed = feed_of(config, dataset, mesh, begun=None)
    of_images = load_trained(autoencoder, step=None, weights="ema", mesh=mesh, task="autoencoder")
    rows, mirrored = np.array([5, 9]), np.array([False, True])
    z = feed.examples.take(rows, mirrored)
    assert z.dtype == np.float32
    assert z.shape == (2, *feed.examples.example_shape) == (2, 8, 8, 2)
    images = build.make_codec(config).decode(feed.codec, build.make_codec(config).encode(z))
    expected = build.make_reconstruct(of_images.model, mesh)(of_images.params, dataset.take(rows, mirrored))
    off = np.abs(np.asarray(images).astype(int) - np.asarray(expected))
    assert off.mean() < 0.5  # float16 moves few values, by one grey level each


@pytest.mark.slow
def test_the_codec_of_a_codebook_decodes_the_nearest_codes(tmp_path):
    config = test_autoencoder_task.config(tmp_path, "vq")
    model = build.make_autoencoder_model(config)
    params = model.network.init(jax.random.key(0))
    made = codec.latents(model.decode, model.latent_shape, abstract_params(model.network))
    statistics = {codec.MEAN: np.float32([1, 2]), codec.STD: np.float32([3, 4])}
    tensors = {codec.PREFIX + name: value for name, value in params.items()} | statistics
    nearest = np.asarray(params["codebook"])[np.random.default_rng(0).integers(0, 16, (2, 8, 8))]
    z = (nearest + 1e-4 - statistics[codec.MEAN]) / statistics[codec.STD]
    images = made.decode(tensors, jnp.asarray(z, jnp.float32))
    expected = codec.to_uint8(model.decoder(params, nearest))
    assert np.abs(np.asarray(images).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.slow
def test_stopping_and_resuming_changes_nothing(workspace, autoencoder, trained, tmp_path):
    run = tmp_path / "resumed"
    train.run(latent(workspace, autoencoder, train__steps=3), run)
    train.run(latent(workspace, autoencoder, codec__path=None), run)  # which it needs no more
    states = []
    for path in (trained, run):
        like = build.make_training(latent(workspace, autoencoder), parallel.make_mesh()).abstract_state
        with Checkpoints(path, read_only=True) as checkpoints:
            states.append(checkpoints.restore(4, like))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_samples_are_scored(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = shutil.copytree(trained, tmp_path / "run")
    np.savez("stem.npz", **random_stem())
    np.savez("real.npz", np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3)).astype(np.uint8))
    evaluator.main([
        "run", f"--workdir={trained}", "--inception=stem.npz", "--reference=real.npz", "--per_class=7",
        "--cache_dir=cache", "--batch_size=10",
    ])  # fmt: skip
    (path,) = (trained / "eval").glob("*n70*.json")
    record = json.loads(path.read_text())
    assert record["samples"]["n"] == 70
    assert record["samples"]["made_by"]["recipe"]["codec"]["network"] == "ldm"


@pytest.mark.slow
def test_an_exported_file_is_the_whole_model(trained, tmp_path):
    file, run = tmp_path / "latent.safetensors", tmp_path / "imported"
    convert(["export", f"--workdir={trained}", "--weights=raw", f"--out={file}"])
    convert(["import", str(file), f"--workdir={run}"])
    first, *others = (
        fooddiff.load(path, weights="raw").sample(classes=["3"], per_class=2) for path in (trained, file, run)
    )
    for images in others:
        np.testing.assert_array_equal(images, first)


@pytest.mark.slow
def test_fine_tuning_goes_on_in_the_same_latents(workspace, autoencoder, trained, tmp_path):
    run = tmp_path / "tuned"
    with pytest.raises(ConfigError, match=r"leave out config\.codec\.path"):
        train.run(latent(workspace, autoencoder, init_from=str(trained)), run)
    train.run(latent(workspace, autoencoder, init_from=str(trained), codec__path=None, train__steps=1), run)
    codecs = [np.load(path / "codec.npz") for path in (trained, run)]
    for name in codecs[0]:
        np.testing.assert_array_equal(codecs[0][name], codecs[1][name])
    with pytest.raises(WorkdirError, match="other latents, or of pixels"):
        train.run(test_recipes.continuous(workspace, init_from=str(trained)), tmp_path / "pixels")


@pytest.mark.slow
def test_a_codec_that_is_missing_or_another_is_refused(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with np.load(run / "codec.npz") as file:
        tensors = dict(file)
    tensors[codec.MEAN] = tensors[codec.MEAN] + 1
    np.savez(run / "codec.npz", **tensors)
    load = partial(load_trained, run, step=None, weights="raw", mesh=parallel.make_mesh())
    with pytest.raises(WorkdirError, match="is not the codec that the checkpoint was trained with"):
        load()
    del tensors[codec.MEAN]
    np.savez(run / "codec.npz", **tensors)
    with pytest.raises(WorkdirError, match=r"does not hold the tensors .* config\.codec describes"):
        load()
    (run / "codec.npz").unlink()
    with pytest.raises(WorkdirError, match=r"codec\.npz is missing"):
        load()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(codec__path=None), ConfigError, r"config\.codec\.path is None, expected the workdir or the file"),
        (dict(codec__path="/nowhere"), FileNotFoundError, "no run in /nowhere"),
        (dict(codec__model__z_channels=3), ConfigError, r"config\.codec\.model\.z_channels is 3, but 12 in the auto"),
        (dict(codec__model__network="unet"), ConfigError, "expected one of ldm, taesd"),
        (dict(data__image_size=17), ConfigError, "image_size 17 cannot be halved"),
    ],
)
def test_other_codecs_are_named(workspace, autoencoder, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train.run(latent(workspace, autoencoder, **changes), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_bits_per_dimension_and_openais_files_are_refused(trained, tmp_path):
    settings = dict(step=None, weights="raw", split="test", count=2, batch_size=2, seed=0, data_path=None)
    with pytest.raises(ValueError, match="bits per dimension are those of pixels"):
        likelihood.run(trained, **settings, cache_dir=None, out=None, stop_if_asked=lambda: None)
    with pytest.raises(SystemExit):
        convert(["export", f"--workdir={trained}", f"--out={tmp_path / 'model.pt'}"])


@pytest.mark.slow
def test_a_dry_run_needs_no_autoencoder(workspace, autoencoder, capsys):
    dry_run.run(latent(workspace, autoencoder, codec__path=None))
    assert "8x8x2 of 16x16 pixels" in capsys.readouterr().out


def test_a_build_that_was_killed_goes_on(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "_CHUNK", 100)
    dataset = build.make_dataset(test_autoencoder_task.config(workspace), "test")
    dataset = replace(dataset, images=dataset.images[:250], labels=dataset.labels[:250])
    calls = []

    def encode(pixels, *, fail_at=None):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(len(pixels))
        return pixels[:, ::2, ::2, :2].astype(np.float32)

    settings = dict(codec="0", mirror=False, cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        load_latents(dataset, partial(encode, fail_at=2), **settings)
    latents = load_latents(dataset, encode, **settings)
    assert calls == [100, 100, 50]
    expected = dataset.images[:, ::2, ::2, :2].astype(np.float32)
    np.testing.assert_array_equal(latents.images[:, 0], expected)
    np.testing.assert_allclose(latents.mean, expected.mean((0, 1, 2)), rtol=1e-5)
    normalised = latents.take(np.arange(250), np.zeros(250, bool))
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, rtol=1e-4)
    with monkeypatch.context() as finished:
        finished.setattr(latents_module, "locked", lambda folder: pytest.fail("it may be read-only"))
        load_latents(dataset, encode, **settings)
    assert len(calls) == 3
    (folder,) = tmp_path.glob("latents-*")
    assert {path.name for path in folder.iterdir()} == {".lock", "latents.npy", "manifest.json"}
    np.save(folder / "latents.npy", latents.images[:9])
    with pytest.raises(ValueError, match=r"the cache of latents .* is damaged"):
        load_latents(dataset, encode, **settings)
    with pytest.raises(ValueError, match="cannot be normalised"):
        load_latents(dataset, lambda pixels: np.ones((len(pixels), 2, 2, 1)), **settings | {"codec": "1"})


@pytest.mark.slow
def test_shapes_of_the_tensors_are_those_of_the_autoencoder(workspace, autoencoder):
    config = latent(workspace, autoencoder)
    tensors = build.make_codec(config).tensors
    like = abstract_params(build.make_codec_model(config).network)
    assert tensors.keys() == {codec.PREFIX + name for name in like} | {codec.MEAN, codec.STD}


@pytest.mark.slow
def test_the_grid_of_single_steps_shows_decoded_latents(workspace, autoencoder, trained):
    shown = read_grid(trained / "samples" / "step_0000004_ema_0.995_one_step.png").images
    assert shown.shape == (5, 9, 16, 16, 3)
    of_images = load_trained(autoencoder, step=None, weights="ema", mesh=parallel.make_mesh(), task="autoencoder")
    dataset = build.make_dataset(latent(workspace, autoencoder), "train")
    first = dataset.images[[np.flatnonzero(dataset.labels == y)[0] for y in range(3)]]
    expected = np.asarray(build.make_reconstruct(of_images.model, parallel.make_mesh())(of_images.params, first[:2]))
    for column in shown:
        assert np.abs(column[[0, 3]].astype(int) - expected).mean() < 0.5  # float16 moves few values, by one level
        assert (column[0] != column[1]).any()
        assert (column[1] != column[2]).any()


def write_ldm_checkpoint(path, params):
    """A checkpoint as latent-diffusion's training saves it."""
    state = OrderedDict(
        (name, of(np.ascontiguousarray(value), name)) for name, value in to_state_dict(params, "ldm").items()
    )
    callbacks = {Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {"best": "x"}}
    path.write_bytes(zip_bytes({"epoch": 1, "state_dict": state, "callbacks": callbacks}))


def write_diffusers_file(path, params):
    """The file of a folder that diffusers saves."""
    state = {name: np.ascontiguousarray(value) for name, value in to_state_dict(params, "diffusers").items()}
    safetensors.numpy.save_file(state, path, {"format": "pt"})


THEIRS = dict(
    model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(8,), z_channels=3,
    latent_channels=2, norm_groups=32,
)  # fmt: skip


def import_theirs(folder, name, write):
    """Imports a random autoencoder of another program, and returns the run with the weights."""
    network = make_network(Autoencoder, image_size=16, **THEIRS)
    rng = np.random.default_rng(0)
    params = {
        ours: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32)
        for ours, leaf in abstract_params(network).items()
    }  # fmt: skip
    write(folder / name, params)
    run = folder / "theirs"
    flags = [f"--workdir={run}", "--config.data.source=digits", "--config.data.image_size=16"]
    convert(["import", str(folder / name), "--config=configs/autoencoder.py:sd", *flags])
    return run, params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write"), [("last.ckpt", write_ldm_checkpoint), ("model.safetensors", write_diffusers_file)]
)
def test_an_autoencoder_of_another_program_is_a_run(tmp_path, name, write):
    run, params = import_theirs(tmp_path, name, write)
    trained = load_trained(run, step=None, weights="ema", mesh=parallel.make_mesh(), task="autoencoder")
    assert trained.model.latent_shape == (8, 8, 2)
    assert {field: trained.config.model[field] for field in ("num_res_blocks", "z_channels")} == {
        "num_res_blocks": 1, "z_channels": 3,
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, dict(trained.params), params)
    assert trained.meta["origin"]["file"] == name


@pytest.mark.slow
def test_an_imported_autoencoder_is_scored_and_is_a_codec(workspace, tmp_path, monkeypatch):
    run, _ = import_theirs(tmp_path, "last.ckpt", write_ldm_checkpoint)
    config = latent(workspace, run)
    config.codec.model.update(THEIRS)
    dataset = build.make_dataset(config, "train")
    feed = feed_of(
        config,
        replace(dataset, images=dataset.images[:64], labels=dataset.labels[:64]),
        parallel.make_mesh(),
        begun=None,
    )
    images = build.make_codec(config).decode(feed.codec, feed.examples.take(np.arange(2), np.zeros(2, bool)))
    assert images.shape == (2, 16, 16, 3)
    monkeypatch.chdir(tmp_path)
    np.savez("stem.npz", **random_stem())
    np.savez("real.npz", np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3)).astype(np.uint8))
    evaluator.main([
        "reconstructions", f"--workdir={run}", "--inception=stem.npz", "--reference=real.npz", "--cache_dir=cache",
    ])  # fmt: skip
    assert len(list((run / "eval").glob("reconstructions_step_0000000_*.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digits.py"], "brings its own config and class names"),
        (["--config=configs/autoencoder.py:taesd"], "whose config.model.network is 'ldm'"),
        (["--config=configs/autoencoder.py:sd", "--class_names=names.txt"], "an autoencoder has no classes"),
        (["--config=configs/autoencoder.py:sd"], "cannot be read as a safetensors file"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path, capsys, arguments, message):
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        convert(["import", str(tmp_path / "model.safetensors"), f"--workdir={tmp_path / 'run'}", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_published_files_are_an_autoencoder(tmp_path):
    network = make_network(TAESD, latent_channels=4, pools=True, channels=8)
    params = network.init(jax.random.key(0))
    files = [tmp_path / f"{half}.pth" for half in ("encoder", "decoder")]
    for file, state_dict in zip(files, to_taesd(params), strict=True):
        write_state_dict(file, state_dict)
    run = tmp_path / "tae"
    flags = [f"--workdir={run}", "--config.data.source=digits", "--config.data.image_size=16"]
    convert(["import", str(files[0]), f"--decoder={files[1]}", "--config=configs/autoencoder.py:taesd", *flags])
    trained = load_trained(run, step=None, weights="ema", mesh=parallel.make_mesh(), task="autoencoder")
    assert trained.model.latent_shape == (2, 2, 4)
    jax.tree.map(np.testing.assert_array_equal, dict(trained.params), params)
    with pytest.raises(SystemExit):
        convert(["import", str(files[0]), f"--decoder={files[1]}", "--config=configs/digits.py", f"--workdir={run}2"])


@pytest.mark.slow
def test_the_origin_and_the_terms_of_an_imported_autoencoder_go_with_the_model(
    workspace, autoencoder, tmp_path, monkeypatch
):
    def imported(*arguments, **how):
        trained = load_trained(*arguments, **how)
        return trained._replace(meta={**trained.meta, "origin": {"file": "published.pth", "sha256": "ab" * 32}})

    monkeypatch.setattr(latents_command, "load_trained", imported)
    config = latent(workspace, autoencoder, train__steps=1)
    train.run(config, tmp_path / "run")
    config.train.steps = 2
    train.run(config, tmp_path / "run")
    convert(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'model.safetensors'}"])
    for where in (tmp_path / "run", tmp_path / "model.safetensors"):
        meta = load_trained(where, step=None, weights="ema", mesh=parallel.make_mesh()).meta
        assert meta["codec_origin"]["file"] == "published.pth"
    card = (tmp_path / "model.safetensors.md").read_text()
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        for text in (card, file.metadata()["licence"]):
            assert "The autoencoder's weights are imported from `published.pth`" in text
    assert "license:" not in card


@pytest.mark.slow
def test_latents_of_another_precision_are_others(workspace, autoencoder, monkeypatch):
    asked = []

    def noted(*arguments, codec, **how):
        asked.append(codec)
        return load_latents(*arguments, codec=codec, **how)

    monkeypatch.setattr(latents_command, "load_latents", noted)
    for dtype in ("float32", "bfloat16"):
        config = latent(workspace, autoencoder, codec__model__dtype=dtype)
        feed_of(config, build.make_dataset(config, "train"), parallel.make_mesh(), begun=None)
    assert asked[0]["weights"] == asked[1]["weights"]
    assert asked[0] != asked[1]
