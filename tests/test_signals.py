"""A training that is asked to stop saves what it has and goes on from there; a second signal ends it at once."""

import re
import signal

import pytest

from fooddiff.commands.signals import graceful_stop
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.record import read_scalars
from tests import tiny
from tests.processes import started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with graceful_stop() as stop_signal:
        assert stop_signal(wait=False) == 0
        signal.raise_signal(number)
        assert stop_signal(wait=False) == number
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_the_second_signal_ends_the_process_at_once(tmp_path):
    program = (
        "import signal, time\nfrom fooddiff.commands.signals import graceful_stop\n"
        "with graceful_stop():\n    signal.raise_signal(15)\n    signal.raise_signal(15)\n    time.sleep(60)"
    )
    with started(["-c", program], tmp_path / "log") as process:
        assert process.end(timeout=50)[0] == 128 + 15


def test_ctrl_c_where_nothing_is_to_be_finished_ends_the_process_though_threads_go_on(tmp_path):
    program = (
        "import signal, threading, time\nfrom fooddiff.commands.terminal import session\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background lacks\n"
        "with session(distributed=False):\n    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    signal.raise_signal(signal.SIGINT)"
    )
    with started(["-c", program], tmp_path / "log") as process:
        status, printed = process.end(timeout=50)
    assert status == 128 + signal.SIGINT
    assert printed == "error: interrupted\n"


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), pytest.param(signal.SIGINT, marks=pytest.mark.long)],
)
def test_a_stopped_training_goes_on_where_it_stopped(tmp_path, number):
    never = 100_000
    config = tiny.config(tmp_path, log__every_steps=10, train__steps=never)
    config.train.checkpoint_every = config.sample.every_steps = config.eval.every_steps = never
    command = tiny.command(config, tmp_path / "run")
    with started(command, tmp_path / "log") as training:
        training.wait_until(lambda: read_scalars(tmp_path / "run"))
        training.popen.send_signal(number)
        status, printed = training.end()
    assert status == 128 + number, printed
    stopped = int(re.search(r"stopped at step (\d+)", printed)[1])
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps() == [stopped]

    end = stopped + 3
    with started([*command, f"--config.train.steps={end}"], tmp_path / "log") as resumed:
        status, printed = resumed.end()
    assert status == 0, printed
    assert f"resumed at step {stopped} of {end}" in printed
    steps = [record["step"] for record in read_scalars(tmp_path / "run") if "train/loss" in record]
    assert steps == sorted(set(steps))
    assert steps[-1] == end
