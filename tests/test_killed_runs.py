"""A training that is killed again and again, while saves are in flight, ends as if nothing had happened."""

import os
import random
import time
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import numpy as np
import pytest

from fooddiff import build, parallel
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.record import read_scalars
from tests import tiny
from tests.processes import Process, started

KILLS = int(os.environ.get("FOODDIFF_KILLS", "2"))
PROGRAM = (
    "import sys; from pathlib import Path\n"
    "from fooddiff.commands import train; from tests import tiny\n"
    "config = tiny.config(Path(sys.argv[1]), train__steps=int(sys.argv[3]), train__checkpoint_every=1,\n"
    "    train__keep_checkpoints=3, log__every_steps=5, sample__every_steps=10**9, eval__every_steps=10**9)\n"
    "train.run(config, Path(sys.argv[2]))\n"
)


def start(workspace: Path, run: Path, steps: int) -> AbstractContextManager[Process]:
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=1"),
        "JAX_COMPILATION_CACHE_DIR": str(workspace / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return started(["-c", PROGRAM, workspace, run, steps], workspace / "log", environment=environment)


def finish(workspace: Path, run: Path, steps: int) -> None:
    with start(workspace, run, steps) as training:
        status, printed = training.end()
    assert status == 0, printed


def newest(run: Path, like) -> int:
    """The step of the newest checkpoint, every bit of which is as it was saved; -1 if there is none."""
    if not (run / "checkpoints").is_dir():
        return -1
    with Checkpoints(run, read_only=True) as checkpoints:
        if not checkpoints.steps():
            return -1
        checkpoints.restore(step := checkpoints.steps()[-1], like)
    return step


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()} if (run / "checkpoints").is_dir() else set()


def records(run: Path) -> list[dict]:
    """What metrics.jsonl says, but for how fast it was."""
    return [{name: value for name, value in record.items() if "perf/" not in name} for record in read_scalars(run)]


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_an_undisturbed_one(tmp_path, capsys):
    like = build.make_training(tiny.config(tmp_path), parallel.make_mesh()).abstract_state
    rng, run, done, leftovers, begun = random.Random(0), tmp_path / "killed", -1, 0, time.perf_counter()
    for life in range(KILLS):
        before = names(run)
        with start(tmp_path, run, 10**6) as training:
            if life % 2:
                time.sleep(rng.uniform(0, 4))  # somewhere in its start
            else:
                training.wait_until(lambda old=before: {name for name in names(run) - old if name.isdigit()})
                assert not {name for name in names(run) & before if not name.isdigit()}  # leftovers were cleaned
                time.sleep(rng.uniform(0, 0.5))  # somewhere in its saves
        leftovers += any(not name.isdigit() for name in names(run))
        survived = newest(run, like)
        assert survived >= done  # nothing that was saved is lost
        done = survived

    end = done + 3
    finish(tmp_path, run, end)
    finish(tmp_path, tmp_path / "undisturbed", end)
    states = []
    for each in (run, tmp_path / "undisturbed"):
        assert names(each) == {str(end - 2), str(end - 1), str(end)}
        with Checkpoints(each, read_only=True) as checkpoints:
            states.append(checkpoints.restore(end, like))
    jax.tree.map(np.testing.assert_array_equal, *states)
    killed, undisturbed = (records(each) for each in (run, tmp_path / "undisturbed"))
    assert killed == undisturbed
    with capsys.disabled():
        seconds = time.perf_counter() - begun
        print(f"\n{KILLS} kills, {leftovers} amid a save, {end} steps, {seconds:.0f} s: nothing was lost")
