"""Several processes work as one: they agree, compute the same, stop together and notice when one is gone."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from fooddiff import build, parallel, processes
from fooddiff.commands import train
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.load import load_trained
from fooddiff.runs.record import read_scalars
from tests import tiny
from tests.processes import started, started_together

PROGRAM = """
import os, re, signal
from fooddiff import processes
from fooddiff.commands.terminal import session

with session(distributed=True):
    me = processes.jax.process_index()
    assert processes.jax.device_count() == 4
    assert processes.first_says(me + 7) == 7

    vote = processes.Vote()
    casts = [vote(15 if (me, call) == (1, 2) else 0, wait=False) for call in range(6)]
    assert casts == [0, 0, 0, 0, 15, 15], casts
    vote = processes.Vote()
    assert vote(15 * me, wait=True) == 15

    processes.check_same("the data", "abc")
    for action, expected in [
        (lambda: processes.check_same("the data", f"set {me}"), f"the data differs .* process {me} has set {me}"),
        (lambda: processes.on_first(lambda: 1 / 0), "division by zero" if me == 0 else "process 0 met an error"),
    ]:
        try:
            action()
        except Exception as error:
            assert re.search(expected, str(error)), error
        else:
            raise AssertionError(expected)

    print("agreed", flush=True)
    if me == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    vote(0, wait=True)
"""


@pytest.mark.slow
def test_processes_agree_and_notice_when_one_is_killed(tmp_path):
    with started_together(["-c", PROGRAM], tmp_path / "logs") as running:
        (first, printed), (second, _) = (process.end() for process in running)
    assert "agreed" in printed, printed
    assert second == -signal.SIGKILL
    assert first == 1
    assert "process 0 of 2 cannot reach the others: one was killed" in printed
    assert "Traceback" not in printed


def test_one_process_agrees_with_itself():
    vote = processes.Vote()
    assert [vote(number, wait=False) for number in (0, 2, 0)] == [0, 2, 2]
    assert processes.first_says(3) == 3
    processes.check_same("the data", "abc")
    with pytest.raises(ZeroDivisionError):
        processes.on_first(lambda: 1 / 0)


@pytest.mark.slow
def test_a_process_that_nobody_told_its_place_says_so(tmp_path):
    program = "from fooddiff.commands.terminal import session\nwith session(distributed=True):\n    pass"
    with started(["-c", program], tmp_path / "log") as process:
        status, printed = process.end()
    assert status == 1
    assert "--distributed is set, but nothing tells this process its place" in printed


def command(config, workdir: Path) -> list[str]:
    """The command line of each of several processes that train together."""
    return [*tiny.command(config, workdir), "--distributed"]


def finish(running) -> list[str]:
    """Waits for processes that must succeed, and returns what they printed."""
    ended = [process.end() for process in running]
    for status, printed in ended:
        assert status == 0, printed
    return [printed for _, printed in ended]


def check_noticed(status: int, printed: str) -> None:
    """Checks that process 0 noticed that the other was killed: it ended and said so.

    Where it waits for the other inside of a library, JAX's coordinator misses a heartbeat and ends it in its words.
    """
    assert status in (1, -signal.SIGABRT), printed
    assert "process 0 of 2 cannot reach the others" in printed or "another task died" in printed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def together(workspace):
    with started_together(command(tiny.config(workspace), workspace / "two"), workspace / "logs") as running:
        first, second = finish(running)
    assert "devices 4 x" in first
    assert "training to step" not in second  # process 0 alone talks
    return workspace / "two"


@pytest.mark.slow
def test_two_processes_train_what_one_does(workspace, together):
    train.run(tiny.config(workspace), workspace / "one")
    for a, b in zip(read_scalars(workspace / "one"), read_scalars(together), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"perf/images_per_second", "perf/input_wait"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3), name
    ours, theirs = (
        load_trained(run, step=4, weights="ema", mesh=parallel.make_mesh()).params
        for run in (workspace / "one", together)
    )
    # Adam's first steps move every weight by lr whatever its gradient, whose sign is rounding where it is about zero
    differences = np.concatenate([np.abs(np.asarray(ours[name]) - np.asarray(theirs[name])).ravel() for name in ours])
    assert np.quantile(differences, 0.95) < 1e-5
    assert {path.name for path in (workspace / "one").iterdir()} == {path.name for path in together.iterdir()}


@pytest.mark.slow
def test_two_processes_sample_what_one_does(workspace, together):
    command = ["run_sample.py", f"--workdir={together}", "--classes=3,1", "--per_class=3", "--batch_size=4"]
    two, one = ([*command, f"--out={workspace / name}_samples"] for name in ("two", "one"))
    with started_together([*two, "--distributed"], workspace / "logs") as running:
        finish(running)
    with started(one, workspace / "log") as alone:
        finish([alone])
    one, two = (
        np.load(next((workspace / name).glob("*.npz")))["arr_0"].astype(int) for name in ("one_samples", "two_samples")
    )
    assert np.abs(one - two).max() <= 1  # rounding may tip a grey level


@pytest.mark.slow
def test_a_signal_or_the_end_of_one_process_stops_the_sampling_of_both_and_nothing_is_drawn_twice(workspace, together):
    out = workspace / "interrupted_samples"
    command = ["run_sample.py", f"--workdir={together}", "--per_class=400", "--batch_size=4", f"--out={out}"]
    with started_together([*command, "--distributed"], workspace / "logs") as running:
        running[0].wait_until(lambda: len(list(out.glob("*.partial/*.npz"))) >= 3)
        running[1].popen.send_signal(signal.SIGINT)
        assert [process.end()[0] for process in running] == [128 + signal.SIGINT] * 2
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.partial/*.npz")}
    assert 3 <= len(kept) < 1000
    with started_together([*command, "--distributed"], workspace / "logs") as running:
        running[0].wait_until(lambda: len(list(out.glob("*.partial/*.npz"))) >= len(kept) + 2)
        running[1].popen.kill()
        status, printed = running[0].end()
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    check_noticed(status, printed)


def endless(workspace):
    """A config of a training that only a signal ends, and of whose state no process has the whole."""
    never = 100_000
    return tiny.config(
        workspace, train__steps=never, train__checkpoint_every=never, sample__every_steps=never, train__shard="all"
    )


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_and_a_signal_to_one_saves_both(workspace, together):
    run, config = shutil.copytree(together, workspace / "stopped"), endless(workspace)
    with started_together(command(config, run), workspace / "logs") as running:
        running[0].wait_until(lambda: read_scalars(run)[-1]["step"] >= 10)
        running[1].popen.send_signal(signal.SIGTERM)
        (status, printed), (other, _) = (process.end() for process in running)
    assert (status, other) == (128 + signal.SIGTERM,) * 2
    assert "resumed at step 4 of 100000" in printed
    steps = [record["step"] for record in read_scalars(run) if "train/loss" in record]
    assert steps == sorted(set(steps))
    with Checkpoints(run, read_only=True) as checkpoints:
        stopped = checkpoints.steps()[-1]
        assert stopped >= 10
        checkpoints.restore(stopped, build.make_training(config, parallel.make_mesh()).abstract_state)


@pytest.mark.long
def test_the_end_of_one_process_ends_the_training_of_the_other(workspace, together):
    run = shutil.copytree(together, workspace / "killed")
    with started_together(command(endless(workspace), run), workspace / "logs") as running:
        running[0].wait_until(lambda: read_scalars(run)[-1]["step"] >= 10)
        running[1].popen.kill()
        check_noticed(*running[0].end())
