"""The evaluator as its user calls it, on tiny images with the golden random stem."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fooddiff.commands.eval import main
from fooddiff.data import sources
from fooddiff.data.cache import load_dataset
from fooddiff.eval import extract as extract_module
from fooddiff.eval import inception
from tests.random_stem import random_stem

STEM = Path("random stem.npz")
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(STEM, **random_stem())


def npz(name, n, seed, noise=0):
    g = np.random.default_rng(seed)
    x = g.integers(0, 256, (n, 8, 8, 3)) * (noise or 1)
    np.savez(name, x.astype(np.uint8), np.arange(n) % 2)
    return name


def call(*arguments):
    main([*arguments, "--inception", str(STEM), "--batch_size", "8", "--cache_dir", "cache"])


def the_record():
    (path,) = Path("eval").glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_images_against_images(capsys):
    call("images", npz("ours.npz", 24, 0), npz("real.npz", 30, 1), "--metrics=fd,kd,pr")
    record = the_record()
    metrics = [result["metric"].split("[")[0] for result in record["results"]]
    assert metrics == ["FD-64", "KD-64", "KD-64", "Precision-64", "Recall-64"]
    assert all(STEM.stem in result["metric"] for result in record["results"])
    assert record["samples"]["n_per_class"] == {"0": 12, "1": 12}
    assert (record["samples"]["n"], record["reference"]["n"]) == (24, 30)
    assert record["versions"]["jax"]
    out, err = capsys.readouterr()
    assert "FD-64[" in out
    assert "n = 30" in out
    assert "warning: FD-64[" in err
    assert "singular" in err
    call("images", "ours.npz", "real.npz")  # measured otherwise: another record
    call("images", "ours.npz", "real.npz")
    assert len(list(Path("eval").glob("ours-vs-real_*.json"))) == 2


@pytest.mark.slow
def test_statistics_stand_for_the_images_that_they_were_taken_of(monkeypatch):
    ours, real = npz("ours.npz", 24, 0), npz("real.npz", 30, 1)
    call("images", ours, real)
    direct = the_record()["results"][0]
    shutil.rmtree("eval")
    call("stats", real, "ref.npz")
    monkeypatch.setattr(inception, "features", lambda *args, **kwargs: pytest.fail("all features are in the cache"))
    call("images", ours, "ref.npz")
    found = the_record()
    assert found["results"][0]["value"] == direct["value"]
    assert found["reference"]["identity"]["provenance"]["feature"] == "64"
    assert found["reference"]["n"] == 30


@pytest.mark.slow
def test_a_folder_and_an_npz_of_the_same_pixels_agree():
    ours, real = npz("ours.npz", 24, 0), npz("real.npz", 30, 1)
    Path("folder").mkdir()
    for i, image in enumerate(np.load(ours)["arr_0"]):
        Image.fromarray(image).save(f"folder/{i:02d}.png")
    call("images", ours, real)
    call("images", "folder", real)
    one, other = (json.loads(path.read_text())["results"][0]["value"] for path in Path("eval").glob("*.json"))
    assert one == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--resize", "half_pixel"], "resize"),
        pytest.param(["--features", "192"], "lacks", marks=pytest.mark.slow),
        pytest.param(["--metrics", "kd"], "only fd", marks=pytest.mark.slow),
    ],
)
def test_statistics_made_in_another_way_are_refused(capsys, change, message):
    call("stats", npz("real.npz", 30, 1), "ref.npz")
    with pytest.raises(SystemExit) as exit_:
        call("images", npz("ours.npz", 24, 0), "ref.npz", *change)
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err
    assert not Path("eval").exists()


@pytest.mark.slow
def test_statistics_of_unknown_origin_are_used_with_a_warning(capsys):
    call("stats", npz("real.npz", 30, 1), "ref.npz")
    with np.load("ref.npz") as file:
        np.savez("edm.npz", mu=file["mu"], sigma=file["sigma"])
    call("images", npz("ours.npz", 24, 0), "edm.npz")
    assert "does not say" in capsys.readouterr().err
    assert the_record()["reference"]["n"] is None


@pytest.mark.slow
def test_lost_chunks_are_computed_again_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(extract_module, "CHUNK", 8)
    ours, real = npz("ours.npz", 24, 0), npz("real.npz", 30, 1)
    call("images", ours, real)
    whole = the_record()["results"]
    chunks = sorted(Path("cache/features").glob("*/0*.npz"))
    assert len(chunks) == 3 + 4
    for lost in (*chunks[1:3], *chunks[-1:], *Path("cache").glob("features/*/stats-*")):
        lost.unlink()
    call("images", ours, real)
    assert the_record()["results"] == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images", "nowhere", "ours.npz", "--inception", str(STEM)], "nowhere does not exist"),
        (["images", "ours.npz", "ours.npz"], "no Inception weights are given"),
        (["images", "ours.npz", "ours.npz", "--inception", "none.pth"], "no Inception weights at none.pth"),
        (["images", "ours.npz", "ours.npz", "--inception", str(STEM), "--batch_size", "3"], "batch size 3"),
    ],
)
def test_mistakes_are_answered_with_a_message(capsys, arguments, message):
    npz("ours.npz", 4, 0)
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--cache_dir", "cache"])
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_is_the_command():
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-m", "fooddiff.eval", "images", "a", "b"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 1
    assert "no Inception weights" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_real_images_give_the_known_figures():
    """The deterministic ones of ../shared/data/README.md; blurred are every third of the test images."""
    archive = SHARED / "data" / "food-101-64px.tar.gz"
    stem = SHARED / "weights" / "inception_stem_nsfwjs.npz"
    if not (archive.exists() and stem.exists()):
        pytest.skip(f"{archive} or {stem} is not there")
    train, test = (
        load_dataset(sources.archive(archive), split, image_size=64, cache_dir="cache") for split in ("train", "test")
    )
    first = np.concatenate([np.flatnonzero(train.labels == y)[:40] for y in range(len(train.class_names))])
    pictures = [Image.fromarray(image) for image in test.images[::3]]
    scored = {
        "train": (train.images[first], 0.157),
        "train_one_per_class": (train.images[first[::40]], 0.48),
        "blurred": ([picture.filter(ImageFilter.GaussianBlur(1)) for picture in pictures], 3.2),
    }
    reference = f"archive:{archive}:test"
    # thousands of images: compiled as users compile
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)

    def evaluator(*arguments):
        command = [sys.executable, "-m", "fooddiff.eval", *arguments, f"--inception={stem}", "--cache_dir=cache"]
        subprocess.run(command, check=True, env=environment)

    evaluator("stats", reference, "ref.npz")
    assert np.trace(np.load("ref.npz")["sigma"]) == pytest.approx(17.9, rel=0.01)
    for name, (images, expected) in scored.items():
        np.savez(f"{name}.npz", np.stack([np.asarray(image) for image in images]))
        evaluator("images", f"{name}.npz", "ref.npz")
        (record,) = Path("eval").glob(f"{name}-vs-ref_*.json")
        (result,) = json.loads(record.read_text())["results"]
        assert result["metric"] == "FD-64[inception_stem_nsfwjs d11d89b6]"
        assert result["value"] == pytest.approx(expected, rel=0.01, abs=0.0005), name
