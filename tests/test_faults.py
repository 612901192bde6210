"""Faults of the disk, of the numbers and of the user: each is named, and nothing that was already written is lost."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff import build, parallel
from fooddiff.commands import sample, scorer, train
from fooddiff.commands.eval import main as evaluate_main
from fooddiff.runs.checkpoint import Checkpoints, DamagedError, MisfitError
from fooddiff.runs.record import read_scalars
from fooddiff.runs.workdir import WorkdirError, claimed, to_json
from fooddiff.train.loop import NonFiniteError
from tests import tiny
from tests.random_stem import random_stem

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workspace(shared_workspace):
    return shared_workspace


@pytest.fixture
def run(tiny_run, tmp_path):
    """A finished run of four steps with checkpoints of steps 2 and 4, to be spoilt."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def errors(caplog, monkeypatch):
    """What the log says."""
    monkeypatch.setattr(logging.getLogger("fooddiff"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def losses(run: Path) -> list[dict]:
    """The records of training, without those of grids."""
    return [record for record in read_scalars(run) if "train/loss" in record]


def largest(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(checkpoint):
    path = largest(checkpoint / "params")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(checkpoint):
    for path in (checkpoint / "rest").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-100])


def lose_an_average(checkpoint):
    shutil.rmtree(checkpoint / "ema")


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def garble_meta(checkpoint):
    (checkpoint / "meta" / "metadata").write_text("{not json")


def change_meta(checkpoint):
    path = checkpoint / "meta" / "metadata"
    path.write_text(path.read_text().replace('"lr": 0.001', '"lr": 0.002'))


DAMAGES = [flip_a_bit, garble_meta, cut_short, lose_an_average, empty, change_meta]


def whole_state(run, workspace):
    training = build.make_training(tiny.config(workspace), parallel.make_mesh())
    with Checkpoints(run, read_only=True) as checkpoints:
        return checkpoints.restore(4, training.abstract_state)


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.long)]
)
def test_a_run_goes_on_with_another_number_of_devices_at_another_path(
    workspace, tiny_run, tmp_path, monkeypatch, before, after
):
    """The batches are the same, and so are the numbers but for the order in which they are summed."""

    def with_devices(count):
        mesh = jax.make_mesh(
            (count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
        )
        monkeypatch.setattr(parallel, "make_mesh", lambda: mesh)

    with_devices(before)
    train.run(tiny.config(workspace, train__steps=2), tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    with_devices(after)
    train.run(tiny.config(workspace), tmp_path / "there")
    for ours, theirs in zip(losses(tmp_path / "there"), losses(tiny_run), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    ours, theirs = whole_state(tmp_path / "there", workspace), whole_state(tiny_run, workspace)
    # Adam's first steps move every weight by lr whatever its gradient, whose sign is rounding where it is about zero
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4 * 2e-3), ours.params, theirs.params)
    differences = [
        np.abs(np.asarray(ours.params[name]) - np.asarray(theirs.params[name])).ravel() for name in ours.params
    ]
    assert np.quantile(np.concatenate(differences), 0.95) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(workspace, tiny_run, run, errors, damage):
    damage(run / "checkpoints" / "4")
    train.run(tiny.config(workspace), run)
    assert "the checkpoint of step 4" in errors.text
    assert "going on from step 2, the newest checkpoint that is sound" in errors.text
    assert (run / "damaged" / "4").is_dir()  # nothing is deleted
    jax.tree.map(np.testing.assert_array_equal, whole_state(run, workspace), whole_state(tiny_run, workspace))
    assert [record["step"] for record in losses(run)] == [2, 4]


def test_when_every_checkpoint_is_damaged_each_is_named_and_nothing_is_touched(workspace, run):
    flip_a_bit(run / "checkpoints" / "4")
    garble_meta(run / "checkpoints" / "2")
    before = sorted((run / "checkpoints").rglob("*"))
    with pytest.raises(DamagedError, match=r"(?s)no checkpoint can be used:.*step 4.*params.*step 2"):
        train.run(tiny.config(workspace), run)
    assert sorted((run / "checkpoints").rglob("*")) == before
    assert not (run / "damaged").exists()


@pytest.mark.parametrize("damage", [flip_a_bit, change_meta])
def test_sampling_refuses_a_damaged_checkpoint(run, damage):
    damage(run / "checkpoints" / "4")
    with pytest.raises(DamagedError, match=r"the checkpoint of step 4 .* is damaged"):
        draw(run)


def test_a_checkpoint_of_another_format_is_no_damage(run):
    path = run / "checkpoints" / "4" / "meta" / "metadata"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(MisfitError, match="has format 99, this version of the program reads format 1"):
        draw(run)
    assert not (run / "damaged").exists()


def test_no_room_for_a_checkpoint_is_said_before_the_first_step(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("fooddiff.commands.train.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"a checkpoint takes .* GB, the disk of .* has 0.00 GB left"):
        train.run(tiny.config(workspace), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def draw(run):
    sample.run(
        run, step=None, weights="raw", classes=(), per_class=1, spec={},
        seed=0, batch_size=4, single_files=False, out=None,
    )  # fmt: skip


def test_a_checkpoint_of_another_run_is_refused(workspace, run):
    """Even if its weights do not fit, it is no damaged one of ours to be passed over."""
    config = tiny.config(workspace, model__channel_mult=(2,))
    state = whole_state(run, workspace)
    other = replace(state, step=jnp.int32(5), params={"other": state.params["conv_out.bias"]})
    with Checkpoints(run) as checkpoints:
        checkpoints.save(other, checkpoints.meta(4) | {"config": to_json(config)})
    with pytest.raises(WorkdirError, match=r"is of another run: model\.channel_mult differ"):
        train.run(tiny.config(workspace), run)
    assert not (run / "damaged").exists()


def test_leftovers_of_a_killed_save_are_cleaned_and_never_read(workspace, run):
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "6.orbax-checkpoint-tmp")
    train.run(tiny.config(workspace), run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_a_checkpoint_that_is_not_finite_is_not_resumed(workspace, run):
    training = build.make_training(tiny.config(workspace), parallel.make_mesh())
    with Checkpoints(run) as checkpoints:
        state, meta = checkpoints.restore(4, training.abstract_state), checkpoints.meta(4)
        state.params["conv_out.bias"] = state.params["conv_out.bias"].at[0].set(np.nan)
        checkpoints.save(replace(state, step=state.step + 1), meta)
        checkpoints.wait()
        with pytest.raises(DamagedError, match=r"the checkpoint of step 5 .* is not finite: params"):
            checkpoints.restore(5, training.abstract_state)


def test_a_split_that_is_open_outlives_its_files(workspace, tmp_path):
    config = tiny.config(workspace, data__cache_dir=str(tmp_path / "cache"))
    dataset = build.make_dataset(config, "train")
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal(dataset.images, build.make_dataset(config, "train").images)  # builds it again


def test_two_trainings_in_one_workdir_are_refused(workspace, run):
    """The lock belongs to an open file, so that this process stands for another one, too."""
    other = pytest.raises(WorkdirError, match=rf"another training is using {run} \(process {os.getpid()} on ")
    with claimed(run, tiny.config(workspace)), other, claimed(run, tiny.config(workspace)):
        pytest.fail("two of them")
    with claimed(run, tiny.config(workspace)):  # a lock file that is left behind is no obstacle
        assert (run / ".lock").exists()


def test_a_start_that_another_one_has_overtaken_is_refused_and_drops_nothing(workspace, run, tmp_path, monkeypatch):
    inner = build.make_dataset

    def overtaken(config, split):
        shutil.copytree(run, tmp_path / "late", dirs_exist_ok=True)
        return inner(config, split)

    monkeypatch.setattr(build, "make_dataset", overtaken)
    with pytest.raises(WorkdirError, match="have come or gone since this start: give the same command again"):
        train.run(tiny.config(workspace), tmp_path / "late")
    for name in ("metrics.jsonl", "config.json"):
        assert (tmp_path / "late" / name).read_bytes() == (run / name).read_bytes()


def test_a_start_that_is_refused_leaves_what_the_run_says_of_itself(workspace, run):
    shutil.rmtree(run / "checkpoints" / "4" / "params")
    shutil.rmtree(run / "checkpoints" / "2" / "params")
    before = {name: (run / name).read_bytes() for name in ("config.json", "versions.json")}
    with pytest.raises(DamagedError):
        train.run(tiny.config(workspace, train__steps=6), run)
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_directory_whose_run_never_saved_takes_what_is_given_now(workspace, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(to_json(tiny.config(workspace, train__steps=9))))
    train.run(tiny.config(workspace, train__steps=2), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["train"]["steps"] == 2


@pytest.mark.slow
def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(workspace, tmp_path, monkeypatch):
    ends, handlers, inner = signal.getsignal(signal.SIGTERM), [], Checkpoints.wait
    monkeypatch.setattr(
        Checkpoints, "wait", lambda self: handlers.append(signal.getsignal(signal.SIGTERM)) or inner(self)
    )
    train.run(tiny.config(workspace, train__steps=2), tmp_path / "short")
    assert [handler is ends for handler in handlers] == [False, False, True]  # when it closes nothing is under way


@pytest.mark.slow
def test_a_workdir_in_training_is_sampled_and_followed_even_when_the_training_deletes_a_checkpoint(
    workspace, run, tmp_path, capsys, monkeypatch
):
    load = scorer.load_trained

    def load_too_late(workdir, *, step, **how):
        if step == 2:
            shutil.rmtree(workdir / "checkpoints" / "2")
        return load(workdir, step=step, **how)

    monkeypatch.setattr(scorer, "load_trained", load_too_late)
    np.savez(tmp_path / "stem.npz", **random_stem())
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
    with claimed(run, tiny.config(workspace)):
        draw(run)
        evaluate_main([
            "follow", f"--workdir={run}", f"--inception={tmp_path / 'stem.npz'}", f"--cache_dir={tmp_path}",
            f"--reference={tmp_path / 'real.npz'}", "--batch_size=4", "--per_class=1", "--sampler=ddim", "--steps=2",
        ])  # fmt: skip
    assert len(list((run / "samples").glob("*_seed0_*.npz"))) == 1
    assert "the training deleted the checkpoint of step 2 before it was scored" in capsys.readouterr().err
    assert [path.name[:12] for path in (run / "eval").iterdir()] == ["step_0000004"]


@pytest.mark.parametrize(
    ("not_finite", "first"),
    [
        (("parameters", "losses", "gradients"), "parameter b, one of 3"),
        (("losses", "gradients"), "the loss of example 1, one of 2"),
        (("gradients",), "the gradient of b, one of 1"),
        ((), None),
    ],
)
def test_the_first_bad_tensor_is_the_one_that_was_computed_first(not_finite, first):
    found = {name: {"a": True, "b": name not in not_finite} for name in ("parameters", "gradients")}
    found["losses"] = np.array([True, "losses" not in not_finite])
    expected = f"the first bad tensor is {first}" if first else "each gradient is finite, but their norm, the updated"
    assert train._diagnose(lambda *_: found, None, None, None).startswith(expected)


@pytest.mark.slow
def test_gradients_that_stay_non_finite_are_named_and_never_saved(workspace, tmp_path):
    config = tiny.config(workspace, objective__vb_weight=1e39, train__steps=40, train__max_skipped=3)
    with pytest.raises(NonFiniteError, match=r"not finite.*; the first bad tensor is the loss of example 0, one of"):
        train.run(config, tmp_path / "run")
    training = build.make_training(config, parallel.make_mesh())
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        for step in checkpoints.steps():
            checkpoints.restore(step, training.abstract_state)  # refuses what is not finite


@pytest.mark.slow
def test_a_save_that_fails_ends_the_run_and_spares_the_checkpoints_before(workspace, run):
    """A limit on the size of files stands for a full disk, which `test_a_disk_that_fills` has for real."""
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from fooddiff.commands import train; from tests import tiny\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n"
        "train.run(tiny.config(Path(sys.argv[2]), train__steps=8), Path(sys.argv[1]))"
    )
    failed = subprocess.run(
        [sys.executable, "-c", program, run, workspace], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert "SaveError: a checkpoint could not be written" in failed.stderr
    training = build.make_training(tiny.config(workspace), parallel.make_mesh())
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        checkpoints.restore(4, training.abstract_state)
    train.run(tiny.config(workspace, train__steps=8), run)  # and with room again it goes on


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, or of as many bytes as asked for."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_fills(workspace, small_disk):
    endless = tiny.config(workspace, train__steps=100, train__keep_checkpoints=100)
    with pytest.raises(OSError, match=r"could not be written|No space left"):
        train.run(endless, small_disk / "run")
    training = build.make_training(endless, parallel.make_mesh())
    with Checkpoints(small_disk / "run", read_only=True) as checkpoints:
        newest = checkpoints.steps()[-1]
        checkpoints.restore(newest, training.abstract_state)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    train.run(tiny.config(workspace, train__steps=newest + 2, train__keep_checkpoints=100), small_disk / "run")
    assert json.loads((small_disk / "run" / "config.json").read_text())["seed"] == endless.seed


def test_a_workdir_that_cannot_be_written(workspace, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        train.run(tiny.config(workspace), small_disk / "run")
