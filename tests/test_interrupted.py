"""A signal amid sampling or evaluation: what is finished is kept, and the same command goes on without repeating it."""

import shutil
import signal

import numpy as np
import pytest

from fooddiff.commands import sample, train
from fooddiff.commands.eval import main
from fooddiff.commands.signals import Stopped
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.record import read_scalars
from fooddiff.sample import generate
from tests import tiny
from tests.random_stem import random_stem


@pytest.fixture(scope="module")
def workspace(tiny_run, tmp_path_factory):
    workspace = tmp_path_factory.mktemp("interrupted")
    np.savez(workspace / "stem.npz", **random_stem())
    shutil.copytree(tiny_run, workspace / "run")
    with tiny.small_reference(20):
        yield workspace


class Drawing:
    """Counts the batches that are drawn, and sends this process a signal amid one of them."""

    def __init__(self, monkeypatch, *rooms):
        self.drawn, self._stop_at = 0, None
        for room in rooms:
            monkeypatch.setattr(f"{room}.draw_batches", self._generate)

    def stop_at(self, batch, number=signal.SIGTERM):
        self.drawn, self._stop_at, self._number = 0, batch, number

    def _generate(self, *arguments):
        for images in generate.draw_batches(*arguments):
            if self.drawn == self._stop_at:
                signal.raise_signal(self._number)
            self.drawn += 1
            yield images


def draw(workspace, out):
    sample.run(
        workspace / "run", step=None, weights="raw", classes=("1", "3"), per_class=4, spec={},
        seed=0, batch_size=2, single_files=False, out=out,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_sampling_keeps_finished_batches_and_goes_on(workspace, tmp_path, monkeypatch, number):
    drawing = Drawing(monkeypatch, "fooddiff.commands.sample")
    draw(workspace, tmp_path / "whole")
    assert drawing.drawn == 4

    drawing.stop_at(1, number)
    with pytest.raises(Stopped) as stopped:
        draw(workspace, tmp_path / "parts")
    assert stopped.value.code == 128 + number
    assert drawing.drawn == 2
    assert not list((tmp_path / "parts").glob("*.npz"))

    drawing.stop_at(None)
    draw(workspace, tmp_path / "parts")
    assert drawing.drawn == 2
    whole, parts = (sorted((tmp_path / name).iterdir()) for name in ("whole", "parts"))
    assert [path.name for path in whole] == [path.name for path in parts]  # no batches are left behind
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in parts]


def test_a_damaged_batch_is_named(workspace, tmp_path, monkeypatch):
    Drawing(monkeypatch, "fooddiff.commands.sample").stop_at(1)
    with pytest.raises(Stopped):
        draw(workspace, tmp_path)
    (first, *_) = sorted(tmp_path.glob("*.partial/*.npz"))
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{first} is damaged .*; delete it and run again"):
        draw(workspace, tmp_path)


@pytest.mark.slow
def test_an_evaluation_keeps_finished_chunks_and_goes_on(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("fooddiff.eval.extract.CHUNK", 10)
    drawing = Drawing(monkeypatch, "fooddiff.eval.generated")
    command = [
        "run", f"--workdir={workspace / 'run'}", f"--inception={workspace / 'stem.npz'}", "--per_class=3",
        f"--cache_dir={tmp_path}", "--batch_size=10",
    ]  # fmt: skip
    drawing.stop_at(1)
    with pytest.raises(Stopped) as stopped:
        main(command)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert drawing.drawn == 2
    assert not (workspace / "run" / "eval").exists()
    drawing.stop_at(None)
    main(command)
    assert drawing.drawn == 1
    assert len(list((workspace / "run" / "eval").iterdir())) == 1


@pytest.mark.long
def test_a_signal_amid_the_evaluation_of_a_training_saves_and_leaves_the_rest_for_the_resumed_run(
    workspace, tmp_path, monkeypatch
):
    monkeypatch.setattr("fooddiff.eval.extract.CHUNK", 10)
    drawing = Drawing(monkeypatch, "fooddiff.eval.generated")
    settings = dict(eval__inception=str(workspace / "stem.npz"), eval__per_class=2, eval__cache_dir=str(tmp_path))
    config = tiny.config(workspace, **settings, sample__batch_size=10, train__steps=4)
    train.run(config, tmp_path / "whole")

    config.eval.cache_dir = str(tmp_path / "another")
    drawing.stop_at(0)
    with pytest.raises(Stopped):
        train.run(config, tmp_path / "parts")
    with Checkpoints(tmp_path / "parts", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2]
    drawing.stop_at(None)
    train.run(config, tmp_path / "parts")
    assert drawing.drawn == 7  # of eight batches, two for each of two weights at two steps, one was kept
    whole, parts = (
        [{name: value for name, value in record.items() if "perf/" not in name} for record in read_scalars(run)]
        for run in (tmp_path / "whole", tmp_path / "parts")
    )
    assert whole == parts
