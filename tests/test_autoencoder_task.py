"""An autoencoder as something to train, on digits of 16 pixels: losses, resuming, scores, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import autoencoder
from fooddiff import build, parallel
from fooddiff.commands import eval as evaluator
from fooddiff.commands import sample, train
from fooddiff.commands.report import main as report
from fooddiff.eval.reconstruction import psnr, ssim
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.load import load_trained
from fooddiff.runs.record import read_scalars
from fooddiff.runs.workdir import WorkdirError
from fooddiff.sample.grid import read_grid
from fooddiff.settings import ConfigError
from fooddiff.train.tasks import autoencoder as task
from tests.random_stem import random_stem


def config(folder: Path, bottleneck: str = "kl", **overrides) -> ConfigDict:
    """configs/autoencoder.py at a size that trains in seconds; overrides are dotted names with __ for dots."""
    config = autoencoder.get_config(bottleneck)
    config.data.source = "digits"
    config.data.image_size = 16
    config.data.cache_dir = str(folder / "cache")
    config.model.model_channels = 8
    config.model.channel_mult = (1, 1)
    config.model.norm_groups = 2
    config.model.latent_channels = 2
    if bottleneck == "vq":
        config.model.num_codes = 16
    config.optimizer.name = "adamw"  # which compiles faster
    config.optimizer.warmup_steps = 0
    config.optimizer.cooldown_steps = None
    config.ema.rates = (0.5,)
    config.train.steps = 6
    config.train.batch_size = 8
    config.train.checkpoint_every = 3
    config.eval.every_steps = 6
    config.eval.count = 20
    config.eval.batch_size = 8
    config.log.every_steps = 1
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


@pytest.fixture(scope="module")
def workspace(shared_workspace):
    return shared_workspace


def whole(workspace, bottleneck: str = "kl", **overrides) -> ConfigDict:
    """The config of the shared run of an autoencoder."""
    return config(workspace, bottleneck, **(dict(train__steps=12, eval__every_steps=12) | overrides))


@pytest.fixture(scope="module", params=["kl", "vq"])
def trained(request, workspace, once):
    return once(request.param, whole(workspace, request.param))


@pytest.mark.slow
def test_the_loss_falls_and_is_recorded_with_its_terms(trained):
    records = read_scalars(trained)
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert {f"train/{name}" for name in task.METRICS} <= records[0].keys()
    assert {name for record in records for name in record if name.startswith("eval/")} == {
        f"eval/{weights}/{metric}, n=20" for weights in ("raw", "ema_0.5") for metric in ("PSNR", "SSIM")
    }


@pytest.mark.slow
def test_the_grid_holds_held_out_images_above_their_reconstructions(trained, workspace):
    grid = read_grid(trained / "samples" / "step_0000012_raw_reconstructions.png")
    heldout = build.make_dataset(config(workspace), "test")
    assert grid.images.shape == (len(grid.class_names), 2, 16, 16, 3)
    assert len(set(grid.class_names)) == len(grid.class_names) > 5
    for (image, _), name in zip(grid.images, grid.class_names, strict=True):
        assert any((image == each).all() for each in heldout.images[heldout.labels == heldout.class_names.index(name)])
    assert (grid.images[:, 0] != grid.images[:, 1]).any()


@pytest.mark.slow
def test_a_resumed_run_is_the_undisturbed_one(workspace, once, tmp_path):
    for steps in (4, 12):
        train.run(whole(workspace, train__steps=steps), tmp_path / "resumed")
    states = []
    for run in (once("kl", whole(workspace)), tmp_path / "resumed"):
        like = build.make_training(whole(workspace), parallel.make_mesh()).abstract_state
        with Checkpoints(run, read_only=True) as checkpoints:
            states.append(checkpoints.restore(12, like))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_reconstructions_are_scored(trained, workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained = shutil.copytree(trained, tmp_path / "run")
    np.savez("stem.npz", **random_stem())
    model = load_trained(trained, step=None, weights="ema", mesh=parallel.make_mesh(), task="autoencoder")
    images = build.make_dataset(config(workspace), "test").images[:60]
    np.savez("real.npz", images)
    evaluator.main([
        "reconstructions", f"--workdir={trained}", "--inception=stem.npz", "--reference=real.npz", "--cache_dir=cache",
        "--batch_size=16",
    ])  # fmt: skip
    (path,) = (trained / "eval").glob("reconstructions_step_0000012_ema_0.5_n60_*.json")
    record = json.loads(path.read_text())
    values = {result["metric"].split("[")[0].strip(): result["value"] for result in record["results"]}
    ours = build.make_reconstruct(model.model, parallel.make_mesh())(model.params, images)
    assert values["PSNR"] == pytest.approx(psnr(images, np.asarray(ours)).mean(), abs=1e-2)
    assert -1 < values["SSIM"] < 1
    assert values["FD-64"] > 0
    assert "PSNR" in capsys.readouterr().out


@pytest.mark.slow
def test_a_report_shows_its_curves(trained, tmp_path):
    report([str(trained), f"--out={tmp_path / 'report.html'}"])
    page = (tmp_path / "report.html").read_text()
    assert "last loss recorded" in page
    assert "not recorded" not in page


@pytest.mark.slow
def test_commands_of_diffusion_models_refuse_it(trained):
    settings = dict(step=None, weights="ema", classes=(), per_class=1, spec={}, seed=0, batch_size=4)
    with pytest.raises(WorkdirError, match="holds a model of the task 'autoencoder'"):
        sample.run(trained, **settings, single_files=False, out=None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective__name", "vq", "is 'vq', but the network of config.model is one for 'kl'"),
        ("objective__error", "l3", "expected one of l1, l2"),
        ("model__network", "unet", "expected one of ldm, taesd"),
        ("data__image_size", 15, "image_size 15 cannot be halved 1 times"),
        ("eval__batch_size", 3, "cannot be divided among 2 devices"),
        ("data__image_size", 8, "have no SSIM: expected at least 11x11"),
    ],
)
def test_bad_values_are_named(tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        train.run(config(tmp_path, **{field: value}), tmp_path / "run")


def test_the_penalties_of_a_batch_are_those_of_its_images_alone():
    rng = np.random.default_rng(0)
    z, noise = (jnp.asarray(rng.normal(size=(3, 4, 4, 2)), jnp.float32) for _ in range(2))
    moments, params = jnp.concatenate([z, noise], axis=-1), {"codebook": z[0, 0, :3] / 2}
    for passage, encoded, options in (
        (task.gaussian, moments, dict(weight=2.0)),
        (task.codebook, z, dict(weight=2.0, beta=0.25)),
    ):
        whole = passage(params, encoded, noise, **options)
        for i in range(3):
            alone = passage(params, encoded[i : i + 1], noise[i : i + 1], **options)
            jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b[0], rtol=1e-5), whole, alone)
        np.testing.assert_allclose(whole.cost, 2 * whole.penalty)


def test_psnr_and_ssim_of_known_pairs():
    black, grey = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(black, grey), 20 * np.log10(255 / 100))
    c1 = (0.01 * 255) ** 2
    np.testing.assert_allclose(ssim(black, grey), c1 / (100**2 + c1), rtol=1e-9)  # no variance: luminance alone
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_allclose(ssim(noise, noise), 1)
    np.testing.assert_allclose(ssim(noise, 255 - noise), ssim(255 - noise, noise))
    assert (ssim(noise, 255 - noise) < 0).all()
    assert np.isfinite(psnr(noise, noise)).all()
