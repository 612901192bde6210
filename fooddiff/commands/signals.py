"""SIGTERM and SIGINT: the first asks to finish what is under way and stop, the second ends the process at once."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from fooddiff import processes

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """A command ended early because a signal asked for it; the exit status is 128 + the signal's number."""

    def __init__(self, number: int):
        """Takes the signal's number."""
        super().__init__(128 + number)


class StopSignal(Protocol):
    """Tells whether the run is to stop. All processes of the run ask at the same points and get the same answer."""

    def __call__(self, *, wait: bool) -> int:
        """The number of a signal that has arrived at any process, or 0.

        Args:
            wait: learn of every signal that arrived before this call; else it may take some more calls to be known,
                and none of them waits for the devices.
        """


@contextmanager
def graceful_stop() -> Iterator[StopSignal]:
    """Catches the two signals while the block runs.

    Yields:
        What to ask for a signal.
    """
    received: list[int] = []
    vote = processes.Vote()

    def handle(number: int, _frame) -> None:
        if received:
            processes.leave(128 + number)  # whatever is being written is written under a temporary name
        received.append(number)
        log.warning("%s: finishing what is under way; once more to leave at once", signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda *, wait: vote(received[0] if received else 0, wait=wait)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_if_asked(stop_signal: StopSignal) -> None:
    """Ends the command if a signal has arrived; for points where everything that was done is saved.

    Raises:
        Stopped: a signal has arrived at any process.
    """
    if number := stop_signal(wait=True):
        raise Stopped(number)
