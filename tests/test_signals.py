"""A training that is asked to stop saves what it has and goes on from there; a second signal ends it at once."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fooddiff.commands.signals import graceful_stop
from fooddiff.train.checkpoint import Checkpoints
from fooddiff.train.record import read_scalars

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with graceful_stop() as stop_signal:
        assert stop_signal(wait=False) == 0
        signal.raise_signal(number)
        assert stop_signal(wait=False) == number
    assert signal.getsignal(number) is before


def test_the_second_signal_ends_the_process_at_once():
    program = (
        "import signal, time\nfrom fooddiff.commands.signals import graceful_stop\n"
        "with graceful_stop():\n    signal.raise_signal(15)\n    signal.raise_signal(15)\n    time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=50, check=False).returncode == 128 + 15


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_goes_on_where_it_stopped(tmp_path, number):
    command = [
        sys.executable, "run_train.py", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}",
        f"--config.data.cache_dir={tmp_path}", "--config.diffusion.timesteps=4", "--config.log.every_steps=10",
        "--config.train.checkpoint_every=100000", "--config.sample.every_steps=100000", "--config.train.steps=100000",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as training:
        while not read_scalars(tmp_path / "run"):
            assert training.poll() is None
            time.sleep(0.2)
        training.send_signal(number)
        log = training.communicate(timeout=120)[1]
    assert training.returncode == 128 + number
    stopped = int(re.search(r"stopped at step (\d+)", log)[1])
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps() == [stopped]

    end = stopped + 3
    command[-1] = f"--config.train.steps={end}"
    resumed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at step {stopped} of {end}" in resumed.stderr
    steps = [record["step"] for record in read_scalars(tmp_path / "run")]
    assert steps == sorted(set(steps))
    assert steps[-1] == end
