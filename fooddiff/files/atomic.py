"""Files and folders that appear whole or not at all."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; what is written there becomes `path` when the block succeeds.

    Args:
        path: the file to create or replace. Its folder is made.

    Yields:
        The temporary path. If the block raises, that file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that readers and crashes see the old content or the new, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder beside `path`, which becomes `path` when the block succeeds.

    Args:
        path: the folder to create; there must be none.

    Yields:
        The temporary folder. If the block raises, it is removed with what is in it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
