"""One writer at a time in a folder, among threads and processes. Owns the lock file in it."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, *, name: str = ".lock", wait: bool = True) -> Iterator[None]:
    """Holds the folder's lock.

    The kernel releases the lock when its holder ends in any way, so a lock is never left behind; the file is. On NFS
    the lock holds between hosts, too.

    Args:
        folder: created if it is missing.
        name: of the lock file, which tells who holds it.
        wait: wait for whoever has the lock, or raise.

    Raises:
        BlockingIOError: another holds the lock, and we do not wait; `strerror` says who.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.seek(0)
                raise BlockingIOError(errno.EAGAIN, file.read() or "its holder is unknown") from None
            log.warning("Waiting for another process that is preparing data in %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
