"""SIGTERM and SIGINT: the first asks to stop after the step under way, the second ends the process at once."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """A command ended early because a signal asked for it; the exit status is 128 + the signal's number."""


@contextmanager
def graceful_stop() -> Iterator[Callable[[], int | None]]:
    """Catches the two signals while the block runs.

    Yields:
        A function that tells the number of the signal that has arrived, or None.
    """
    received: list[int] = []

    def handle(number: int, _frame) -> None:
        if received:
            os._exit(128 + number)  # whatever is being written is written under a temporary name
        received.append(number)
        log.warning("%s: stopping after this step; once more to leave at once", signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
