"""Super-resolution: what a model is shown, cascades, scores against bicubic interpolation, and what is refused."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import fooddiff
from fooddiff import build, parallel, processes
from fooddiff.arrays import Batch
from fooddiff.codec import to_signed
from fooddiff.commands import sample, superres, train
from fooddiff.commands.companions import check_enlarges
from fooddiff.commands.eval import main as evaluator
from fooddiff.convert import importing
from fooddiff.low_res import shrink
from fooddiff.runs.load import load_trained
from fooddiff.runs.workdir import WorkdirError
from fooddiff.sample.enlarge import CascadeParams, bicubic, cascade, of_real, rows_of
from fooddiff.sample.grid import read_grid
from fooddiff.settings import ConfigError
from tests import tiny
from tests.openai_files import write_random_pt
from tests.random_stem import random_stem

RNG = np.random.default_rng(0)


def config(workspace, low_res=(8, 0.2, 0.05), **overrides) -> ConfigDict:
    """The tiny model as one that enlarges 8 pixels to 16."""
    made = tiny.config(workspace, data__image_size=16)
    made.low_res = ConfigDict(dict(zip(("size", "max_noise", "noise"), low_res, strict=True)))
    made.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return made


def imported(workspace, name, made):
    """A run whose weights are random, those that start at zero included."""
    write_random_pt(workspace / f"{name}.pt", made)
    importing.import_openai(workspace / f"{name}.pt", workspace / name, made, None)
    return workspace / name


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("superres")


@pytest.fixture(scope="module")
def upsampler(workspace):
    return imported(workspace, "upsampler", config(workspace))


@pytest.fixture(scope="module")
def base(workspace):
    return imported(workspace, "base", tiny.config(workspace))


def load(path):
    return load_trained(path, step=None, weights="ema", mesh=parallel.make_mesh())


def pixels(n, size):
    return RNG.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_a_small_image_is_the_mean_of_blocks():
    images = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
    small = np.asarray(shrink(images, 2))
    assert small.shape == (2, 2, 2, 3)
    np.testing.assert_allclose(small[1, 0, 1], images[1, :4, 4:].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(shrink(images, 8), images)


@pytest.mark.parametrize("max_noise", [0.0, 0.4])
def test_training_shows_small_images_with_noise_of_all_levels(tmp_path, max_noise):
    made = config(tmp_path, low_res=(8, max_noise, 0.0))
    task = build._diffusion_task(made, build.make_diffusion_model(made))
    batch = Batch(pixels(64, 16), {"y": np.zeros(64, np.int32)})
    cond = task.draw(task.init_carried(jax.random.key(1)), batch, jax.random.key(0)).cond
    noise = np.asarray(cond["low_res"] - shrink(to_signed(jax.numpy.asarray(batch.pixels)), 8))
    levels = noise.std(axis=(1, 2, 3))
    assert noise.shape == (64, 8, 8, 3)
    if max_noise:
        assert levels.min() < 0.1 * max_noise
        assert 0.9 * max_noise < levels.max() < 1.2 * max_noise
        assert levels.mean() == pytest.approx(max_noise / 2, rel=0.2)
    else:
        np.testing.assert_allclose(noise, 0, atol=1e-6)


@pytest.mark.slow
def test_the_network_sees_the_small_image_and_noise_that_belongs_to_the_sample(upsampler):
    """One of its size and a larger one of which it is the small version come to the same."""
    trained, mesh = load(upsampler), parallel.make_mesh()
    draw = build.make_sampler(trained.model, mesh, build.sampler_spec(trained.config.sample))
    small, ids = pixels(4, 8), np.array([[3, 0], [1, 0], [1, 1], [2, 0]], np.int32)

    def drawn(images, ids=ids):
        return np.asarray(draw(trained.params, jax.random.key(0), ids, images)).astype(int)

    here = drawn(small)
    assert here.shape == (4, 16, 16, 3)
    assert np.abs(drawn(small.repeat(2, axis=1).repeat(2, axis=2)) - here).max() <= 1
    assert np.abs(drawn(small[::-1], ids[::-1])[::-1] - here).max() <= 1
    assert np.abs(drawn(small[::-1]) - here).max() > 1
    ours, other = (
        trained.model._replace(low_res=trained.model.low_res._replace(noise=noise)).cond(
            jax.random.key(0), ids, to_signed(jax.numpy.asarray(small))
        )["low_res"]
        for noise in (0.1, 0.0)
    )
    assert np.asarray(ours - other).std() == pytest.approx(0.1, rel=0.2)


def test_a_sample_enlarges_the_image_of_its_class_and_index():
    labels = np.array([1, 0, 1, 2])
    ids = np.array([[1, 0], [1, 1], [1, 2], [2, 5]], np.int32)
    np.testing.assert_array_equal(rows_of(labels, ids), [0, 2, 0, 3])
    images = pixels(4, 4)
    draw = of_real(lambda params, key, ids, images: images, images, labels)
    np.testing.assert_array_equal(draw({}, None, ids), images[[0, 2, 0, 3]])
    with pytest.raises(ValueError, match="no image of class 3"):
        rows_of(labels, np.array([[3, 0]], np.int32))


def test_a_cascade_enlarges_what_the_base_draws_with_noise_of_its_own():
    key, ids = jax.random.key(1), np.array([[1, 0]], np.int32)
    draw = cascade(lambda params, key, ids: (params, key), lambda params, key, ids, images: (params, key, images))
    params, above, (base_params, below) = draw(CascadeParams("base", "upsampler"), key, ids)
    assert (params, base_params) == ("upsampler", "base")
    assert (jax.random.key_data(below) == jax.random.key_data(key)).all()
    assert (jax.random.key_data(above) != jax.random.key_data(key)).any()


@pytest.mark.parametrize("size", [4, 8])
def test_bicubic_is_pillows(size):
    images = pixels(2, 16)
    ours = np.asarray(bicubic(jax.numpy.asarray(images), size)).astype(int)
    blocks = images.reshape(2, size, 16 // size, size, 16 // size, 3).mean(axis=(2, 4))
    small = Image.fromarray(np.round(blocks[1]).astype(np.uint8))
    assert np.abs(ours[1] - np.asarray(small.resize((16, 16), Image.Resampling.BICUBIC))).max() <= 2


def drawn(run, out, **changes):
    settings = dict(
        step=None, weights="ema", classes=("3", "1"), per_class=2, spec={}, seed=0, batch_size=4, single_files=False,
    )  # fmt: skip
    sample.run(run, out=out, **(settings | changes))
    (path,) = out.glob("*.npz")
    return np.load(path)["arr_0"].astype(int)


@pytest.mark.slow
def test_a_cascade_from_the_command(base, upsampler, tmp_path):
    small = drawn(base, tmp_path / "small")
    large = drawn(base, tmp_path / "large", upsample=upsampler)
    assert small.shape == (4, 8, 8, 3)
    assert large.shape == (4, 16, 16, 3)
    alone = drawn(base, tmp_path / "alone", upsample=upsampler, classes=("1",), per_class=4)
    assert np.abs(large[2] - alone[0]).max() <= 1
    (a,), (b,) = ([path.stem for path in (tmp_path / name).glob("*.npz")] for name in ("small", "large"))
    assert a != b


@pytest.mark.slow
def test_a_cascade_is_scored_at_the_size_of_its_images(base, upsampler, tmp_path):
    np.savez(tmp_path / "stem.npz", **random_stem())
    with tiny.small_reference(20):
        evaluator([
            "run", f"--workdir={base}", f"--upsample={upsampler}", "--per_class=1", "--batch_size=10",
            f"--inception={tmp_path / 'stem.npz'}", f"--cache_dir={tmp_path}",
        ])  # fmt: skip
    (path,) = (base / "eval").glob("*.json")
    record = json.loads(path.read_text())
    assert record["reference"]["identity"]["size"] == 16
    above = record["samples"]["made_by"]["recipe"]["upsampler"]
    assert above["sampling"]["sampler"] == "ancestral"
    assert above["weights_sha256"] == processes.sha256_of(load(upsampler).params)


@pytest.mark.slow
def test_models_that_do_not_fit_are_named(base, upsampler, tmp_path):
    above, below = load(upsampler), load(base)
    check_enlarges(above, below, tmp_path)
    check_enlarges(above, above, tmp_path)  # it shrinks what is as large as what it gives
    below.config.data.image_size = 12
    with pytest.raises(WorkdirError, match=r"takes images of 8 pixels, or shrinks .* up to 16; the model draws 12"):
        check_enlarges(above, below, tmp_path)
    below.config.data.image_size = 8
    without_classes = below._replace(model=below.model._replace(num_classes=None))
    with pytest.raises(WorkdirError, match="told the class of an image, and the model knows no classes"):
        check_enlarges(above, without_classes, tmp_path)
    with pytest.raises(WorkdirError, match=r"the classes of the upsampler .* are not those of the model"):
        check_enlarges(above._replace(class_names=above.class_names[::-1]), below, tmp_path)
    check_enlarges(above._replace(model=above.model._replace(num_classes=None)), without_classes, tmp_path)


@pytest.mark.slow
def test_what_draws_nothing_by_itself_is_refused(base, upsampler, tmp_path):
    for call in (
        lambda: drawn(upsampler, tmp_path),
        lambda: fooddiff.load(upsampler),
        lambda: drawn(base, tmp_path, guide=upsampler, spec={"guidance": 2.0}),
    ):
        with pytest.raises(WorkdirError, match="enlarges images of 8 pixels and draws none by itself"):
            call()
    with pytest.raises(WorkdirError, match="holds no model for super-resolution"):
        drawn(base, tmp_path, upsample=base)


@pytest.mark.slow
def test_model_and_bicubic_are_scored_on_the_same_images(upsampler, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    np.savez("stem.npz", **random_stem())
    evaluator([
        "superres", f"--workdir={upsampler}", "--inception=stem.npz", "--cache_dir=cache", "--per_class=2",
        "--batch_size=4",
    ])  # fmt: skip
    (ours,) = (upsampler / "eval").glob("superres_step_0000000_ema_0.995_ancestral-all_seed0_n20_*.json")
    (rule,) = (upsampler / "eval").glob("superres_bicubic_8_n20_*.json")
    ours, rule = (json.loads(path.read_text()) for path in (ours, rule))
    assert ours["reference"] == rule["reference"]
    assert ours["reference"]["n_per_class"] == dict.fromkeys("0123456789", 2)
    values = [{r["metric"].split("[")[0].strip(): r["value"] for r in record["results"]} for record in (ours, rule)]
    assert values[0].keys() == values[1].keys() == {"FD-64", "PSNR", "SSIM"}
    assert values[1]["PSNR"] > values[0]["PSNR"]  # whose weights are random
    test = build.make_dataset(load(upsampler).config, "test")
    real = np.concatenate([test.images[test.labels == y][:2] for y in range(10)]).astype(float)
    made = np.asarray(bicubic(jax.numpy.asarray(real.astype(np.uint8)), 8)).astype(float)
    errors = ((real - made) ** 2).mean(axis=(1, 2, 3))
    assert values[1]["PSNR"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), rel=1e-3)
    assert "8 pixels enlarged, bicubic:" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--per_class is 999, expected 1 to"):
        superres._ids(superres.scorer.reference_of(load(upsampler).config), 999)


@pytest.mark.slow
def test_a_run_draws_grids_of_training_images_enlarged_and_scores_itself(workspace):
    np.savez(workspace / "random.npz", **random_stem())
    made = config(
        workspace, eval__inception=str(workspace / "random.npz"), eval__every_steps=2, eval__per_class=1,
        train__steps=2, sample__every_steps=2,
    )  # fmt: skip
    with tiny.small_reference(30):
        train.run(made, workspace / "run")
    grid = read_grid(workspace / "run" / "samples" / "step_0000002_raw.png")
    assert grid.images.shape == (2, 1, 16, 16, 3)
    assert (workspace / "run" / "samples" / "step_0000002_ema_0.995_one_step.png").is_file()
    (record, *_) = (workspace / "run" / "eval").glob("step_0000002_raw_*.json")
    assert "enlarges" in json.loads(record.read_text())["samples"]["made_by"]["recipe"]


@pytest.mark.slow
def test_the_bound_knows_the_small_image(upsampler, tmp_path):
    evaluator(["bpd", f"--workdir={upsampler}", "--count=10", f"--out={tmp_path / 'bpd.json'}"])
    assert np.isfinite(json.loads((tmp_path / "bpd.json").read_text())["bits_per_dim"])


@pytest.mark.parametrize(
    ("low_res", "changes", "message"),
    [
        ((5, 0.2, 0.1), {}, "config.low_res.size is 5, expected a divisor of config.data.image_size 16 below it"),
        ((16, 0.2, 0.1), {}, "config.low_res.size is 16"),
        ((8, 0.1, 0.2), {}, "config.low_res.noise is 0.2 and max_noise 0.1, expected 0 <= noise <= max_noise"),
        ((8, 0.2, 0.1), dict(model__network="uvit"), "takes config.model.network 'unet'"),
    ],
)
def test_bad_values_are_named(tmp_path, low_res, changes, message):
    with pytest.raises(ConfigError, match=message):
        build.make_diffusion_model(config(tmp_path, low_res, **changes))


def test_the_condition_is_asked_for_in_one_place(tmp_path):
    made = tiny.config(tmp_path)
    made.model.low_res = True
    with pytest.raises(ConfigError, match=r"config\.model has no field low_res"):
        build.make_diffusion_model(made)
