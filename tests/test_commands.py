"""The commands as their users call them: train, resume, sample, dry run, and what they refuse."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fooddiff import build, parallel
from fooddiff.commands import dry_run, sample, train
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.load import load_trained
from fooddiff.runs.record import read_scalars
from fooddiff.runs.workdir import WorkdirError
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent

STEPS_RECORDED = [2, 4, 4, 4]  # the loss, and at the last step the colours of two grids


@pytest.fixture(scope="module")
def workspace(shared_workspace):
    return shared_workspace


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("workdir") / "run")


def draw(run, **changes):
    settings = dict(
        step=None, weights="ema", classes=("1", "3"), per_class=2, spec={},
        seed=0, batch_size=4, single_files=False, out=None,
    )  # fmt: skip
    sample.run(run, **(settings | changes))


def restored(run, config):
    """The whole training state of the newest checkpoint."""
    with Checkpoints(run, read_only=True) as checkpoints:
        return checkpoints.restore(
            checkpoints.steps()[-1], build.make_training(config, parallel.make_mesh()).abstract_state
        )


def test_a_run_leaves_every_file_that_later_stages_read(trained):
    assert {path.name for path in trained.iterdir()} == {
        ".lock", "checkpoints", "config.json", "metrics.jsonl", "samples", "tb", "versions.json",
    }  # fmt: skip
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 4
    assert "jax" in json.loads((trained / "versions.json").read_text())
    assert [record["step"] for record in read_scalars(trained)] == STEPS_RECORDED
    assert {path.name for path in (trained / "samples").iterdir()} >= {
        "step_0000004_raw.png", "step_0000004_ema_0.995.png", "step_0000004_ema_0.995_one_step.png",
    }  # fmt: skip
    with Checkpoints(trained, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        meta = checkpoints.meta(4)
    assert meta["class_names"] == list("0123456789")
    assert meta["config"]["diffusion"]["timesteps"] == 4


@pytest.mark.parametrize(
    "stops", [pytest.param((3,), marks=pytest.mark.slow), pytest.param((1, 2), marks=pytest.mark.long)]
)
def test_stopping_and_resuming_changes_nothing(workspace, trained, tmp_path, stops):
    """Amid the steps between two records, after a step without a checkpoint of its own, and after one with."""
    run = tmp_path / "run"
    for steps in (*stops, 4):
        train.run(tiny.config(workspace, train__steps=steps), run)
    a, b = (restored(path, tiny.config(workspace)) for path in (trained, run))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    grids = [(path / "samples" / "step_0000004_raw.png").read_bytes() for path in (trained, run)]
    assert grids[0] == grids[1]


@pytest.mark.slow
def test_a_resume_of_another_optimizer_is_exact_too(workspace, tmp_path):
    config = tiny.config(workspace, sample__every_steps=100, eval__every_steps=100)
    config.optimizer.update(name="muon", weight_decay=0.01)
    for run, stops in ("whole", (4,)), ("halves", (2, 4)):
        for steps in stops:
            config.train.steps = steps
            train.run(config, tmp_path / run)
    a, b = (restored(tmp_path / run, config) for run in ("whole", "halves"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_finished_run_is_left_alone(workspace, trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "checkpoints").rglob("*") if path.is_file()}
    train.run(tiny.config(workspace), trained)
    assert before == {path: path.stat().st_mtime_ns for path in (trained / "checkpoints").rglob("*") if path.is_file()}
    assert [record["step"] for record in read_scalars(trained)] == STEPS_RECORDED


def recorded(run):
    """What metrics.jsonl says, but for how fast it was."""
    return [{name: value for name, value in record.items() if "perf/" not in name} for record in read_scalars(run)]


@pytest.mark.parametrize(
    "lost",
    [
        "all records of a grid's step",
        "the checkpoint",
        pytest.param("the last record", marks=pytest.mark.slow),
        pytest.param("a grid", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_amid_its_grids_records_what_it_would_have(workspace, trained, tmp_path, lost):
    run = shutil.copytree(trained, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    if lost == "the last record":
        (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    elif lost == "all records of a grid's step":
        (run / "metrics.jsonl").write_text("".join(lines[:-2]))
    elif lost == "the checkpoint":
        shutil.rmtree(run / "checkpoints" / "4")
    else:
        (run / "samples" / "step_0000004_raw.png").write_bytes(b"damaged")
    train.run(tiny.config(workspace), run)
    assert recorded(run) == recorded(trained)
    names = [name for record in recorded(run) for name in record if "colour" in name]
    assert names == ["samples/raw/colour_spread_ratio", "samples/ema_0.995/colour_spread_ratio"]
    grids = [(path / "samples" / "step_0000004_raw.png").read_bytes() for path in (trained, run)]
    assert grids[0] == grids[1]
    newest = max((run / "tb").iterdir(), key=lambda path: path.stat().st_mtime_ns).read_bytes()
    for name in (b"samples/raw", b"samples/ema_0.995", b"samples/ema_0.995_one_step"):  # TensorBoard hid them
        assert name in newest


def test_another_config_is_refused_with_the_difference(workspace, trained):
    with pytest.raises(WorkdirError, match=r"optimizer.lr: 0.001 in the workdir, 0.5 now"):
        train.run(tiny.config(workspace, optimizer__lr=0.5), trained)
    assert json.loads((trained / "config.json").read_text())["optimizer"]["lr"] == 0.001


def test_a_directory_of_something_else_is_refused(workspace, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(WorkdirError, match="is not empty and holds no run"):
        train.run(tiny.config(workspace), other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_start_that_fails_leaves_the_directory_free(workspace, tmp_path):
    run = tmp_path / "typo"
    with pytest.raises(ValueError, match="archive"):
        train.run(tiny.config(workspace, data__source="archiv"), run)
    assert not run.exists()


def test_other_data_are_refused(workspace, trained, monkeypatch):
    with Checkpoints(trained, read_only=True) as checkpoints:
        meta = checkpoints.meta(4)
    with pytest.raises(WorkdirError, match="trained on other data: data_sha256"):
        train._check_same_run(meta, meta | {"data_sha256": "0"}, {}, trained)


def test_sampling_writes_a_grid_the_pixels_and_single_files(trained, tmp_path):
    draw(trained, out=tmp_path, single_files=True, classes=("3", "1"))
    (stem,) = (path.stem for path in tmp_path.glob("step_0000004_ema_0.995_ancestral-all_seed0_n4_*.npz"))
    with np.load(tmp_path / f"{stem}.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (4, 8, 8, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels, [3, 3, 1, 1])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / stem / "1" / "00001.png")), images[3])
    assert Image.open(tmp_path / f"{stem}.png").size[0] > 128


@pytest.mark.slow
def test_other_samples_never_take_the_place_of_earlier_ones(trained, tmp_path):
    for classes in (("3",), ("1",), ("3",)):
        draw(trained, out=tmp_path, classes=classes)
    assert len(list(tmp_path.glob("*.npz"))) == 2


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch_size_or_the_other_classes(trained, tmp_path):
    draw(trained, out=tmp_path / "a", classes=(), batch_size=20)
    draw(trained, out=tmp_path / "b", classes=("3",), per_class=1, batch_size=2)
    a, b = (np.load(next((tmp_path / name).glob("*.npz")))["arr_0"].astype(int) for name in "ab")
    assert a.shape == (20, 8, 8, 3)
    assert np.abs(a[6] - b[0]).max() <= 1  # the first 3; float rounding may tip a grey level


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(classes=("pizza",)), "no class 'pizza': the model knows 0, 1, 2"),
        (dict(weights="ema_0.9"), "expected raw, ema_0.995"),
        (dict(step=3), r"no checkpoint of step 3 .* there are \[2, 4\]"),
        (dict(spec=dict(sampler="euler")), "expected one of ancestral, ddim, dpmpp_2m"),
        (dict(spec=dict(spacing="kerras")), "expected one of .*: did you mean karras"),
        (dict(spec=dict(spacing="karras")), "spacing is 'karras', but without a number of steps"),
        (dict(spec=dict(steps=9)), "cannot sample in 9 steps: expected 2 to 4"),
        (dict(per_class=0), "--per_class is 0, expected at least 1"),
        (dict(batch_size=-2), "--batch_size is -2, expected at least 1"),
    ],
)
def test_bad_sampling_requests_are_named(trained, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        draw(trained, out=tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_workdir_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run in .*: expected a directory that run_train\.py has written"):
        draw(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        draw(tmp_path)


@pytest.mark.slow
def test_dry_run_reports_and_touches_nothing(trained, tmp_path, capsys):
    config = tiny.config(tmp_path)
    dry_run.run(config)
    printed = capsys.readouterr().out
    parameters = sum(leaf.size for leaf in load_trained(
        trained, step=4, weights="raw", mesh=parallel.make_mesh()).params.values())  # fmt: skip
    assert f"{parameters:,}" in printed
    assert all(f"{what} " in printed for what in ("FLOP per image", "FLOP per step", "the whole run"))
    measured = " ".join(printed.split()).partition("Measured here, now, on made-up images: ")[2]
    assert float(measured.split()[0]) > 0
    assert "hours of such steps" in measured
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("free", "said"), [(10, "is 0.00 GB, a step needs"), (None, "is not known")])
def test_dry_run_times_nothing_where_memory_may_not_do(tmp_path, capsys, monkeypatch, free, said):
    monkeypatch.setattr(dry_run, "_free_bytes", lambda mesh: free)
    dry_run.run(tiny.config(tmp_path))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"No step was timed: the memory left on a device {said}" in printed
    assert "Measured" not in printed


@pytest.mark.slow
def test_command_lines(trained, tmp_path):
    """The scripts themselves: a good call, and errors that end with a message instead of a traceback."""

    def call(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)

    good = call("run_sample.py", f"--workdir={trained}", "--classes=7", "--per_class=2", f"--out={tmp_path}")
    assert good.returncode == 0, good.stderr
    assert "step 4, weights ema_0.995" in good.stderr
    assert len(list(tmp_path.glob("*.npz"))) == 1
    for arguments, message in [
        (("run_sample.py", "--workdir=/nowhere"), "no run in /nowhere"),
        (("run_train.py", "--config=configs/digits.py", "--config.train.stepps=4"), "did you mean train.steps?"),
        (("run_train.py", "--config=configs/digits.py"), "--workdir is missing"),
        (("run_train.py", "--config=configs/none.py", "--workdir=/nowhere"), "configs/none.py"),
    ]:
        bad = call(*arguments)
        assert bad.returncode == 1
        assert message in bad.stderr
        assert "Traceback" not in bad.stderr
