"""Trains with evaluation, checkpoints and grids for a while and watches memory and open files.

python -m tests.soak --minutes=30
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from tests.processes import started
from tests.random_stem import random_stem

PROGRAM = (
    "import sys; from pathlib import Path\n"
    "from fooddiff.commands import train; from tests import tiny\n"
    "workspace = Path(sys.argv[1])\n"
    "config = tiny.config(workspace, train__steps=10**9, train__checkpoint_every=20, train__keep_checkpoints=3,\n"
    "    train__keep_best=2, log__every_steps=10, sample__every_steps=30, eval__every_steps=40, eval__per_class=1,\n"
    "    eval__inception=str(workspace / 'stem.npz'))\n"
    "train.run(config, workspace / 'run')\n"
)


class Reading(NamedTuple):
    """What a process holds at one moment."""

    memory: float  # resident, MB
    files: int  # open


class Soak(NamedTuple):
    """What a process held after it had warmed up and at its end, over a third of the time each.

    The median memory, and the fewest open files, since a checkpoint that is being written opens some thirty.
    """

    early: Reading
    late: Reading
    readings: int


def reading(process: int) -> Reading:
    """Looks at a process."""
    status = Path(f"/proc/{process}/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return Reading(int(kilobytes) / 1024, len(os.listdir(f"/proc/{process}/fd")))


def soak(workspace: Path, seconds: float) -> Soak:
    """Trains for some time.

    Args:
        workspace: a folder for everything that the training writes.
        seconds: how long, after the evaluation of step 80.
    """
    np.savez(workspace / "stem.npz", **random_stem())
    readings = []
    with started(["-c", PROGRAM, workspace], workspace / "log") as training:
        training.wait_until(lambda: list((workspace / "run" / "eval").glob("step_0000080_*")))
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            readings.append(reading(training.popen.pid))
            time.sleep(min(1.0, seconds / 60))
    sixth = len(readings) // 6
    early, late = (
        Reading(median(each.memory for each in part), min(each.files for each in part))
        for part in (readings[sixth : 3 * sixth], readings[-2 * sixth :])
    )
    return Soak(early, late, len(readings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), minutes * 60)
        records = (Path(folder) / "run" / "metrics.jsonl").read_text().count("\n")
        evaluations = len(list((Path(folder) / "run" / "eval").iterdir()))
    print(
        f"{minutes:g} minutes, {records:,} records, {evaluations} evaluations: memory {found.early.memory:.0f} -> "
        f"{found.late.memory:.0f} MB, open files {found.early.files:g} -> {found.late.files:g}"
    )
