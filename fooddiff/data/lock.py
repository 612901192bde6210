"""One writer at a time in a folder, among threads and processes. Owns the file `.lock` in it."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; waits for whoever has it.

    The kernel releases the lock when its holder ends in any way, so a lock is never left behind.

    Args:
        folder: created if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("Waiting for another process that is preparing data in %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
