"""The whole chain on real data: digits that a classifier reads, and photographs through TensorFlow Datasets."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fooddiff.commands import train
from fooddiff.runs.record import read_scalars
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


def run(script, *flags):
    environment = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
    }  # one device, as users have
    finished = subprocess.run(
        [sys.executable, script, *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_classifier_reads_the_digits(tmp_path):
    """Trains configs/digits.py as the README says; a classifier of real digits must read what was asked for."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    workdir = tmp_path / "digits"
    log = run(
        "run_train.py", "--config=configs/digits.py", f"--workdir={workdir}", f"--config.data.cache_dir={tmp_path}"
    )
    assert f"python run_sample.py --workdir={workdir}" in log
    run("run_sample.py", f"--workdir={workdir}", "--per_class=20", f"--out={tmp_path}")

    with np.load(next(tmp_path.glob("*.npz")), allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert np.bincount(labels).tolist() == [20] * 10
    real = load_digits()
    classifier = SVC(gamma=0.001).fit(real.data, real.target)  # the settings of scikit-learn's own digits example
    grey = images.mean(axis=-1).reshape(len(images), -1) * 16 / 255
    accuracy = (classifier.predict(grey) == labels).mean()
    print(f"{accuracy:.1%} of 200 generated digits are read as the label that was asked for")
    assert accuracy >= 0.95


@pytest.mark.slow
def test_trains_on_photographs_through_tensorflow_datasets(mini_food101_dir, tmp_path):
    config = tiny.config(
        tmp_path,
        data__source="food101",
        data__path=str(mini_food101_dir),
        data__image_size=32,
        model__num_classes=101,
        train__steps=2,
        log__every_steps=1,
        sample__every_steps=2,
        sample__classes=("pizza", "sushi"),
    )
    train.run(config, tmp_path / "run")
    losses = [record["train/loss"] for record in read_scalars(tmp_path / "run") if "train/loss" in record]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert (tmp_path / "run" / "samples" / "step_0000002_raw.png").exists()
