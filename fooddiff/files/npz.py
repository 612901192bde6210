"""Arrays to npz files, and from such as may come from anybody."""

import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from fooddiff.files.atomic import atomic_path

MAX_ARRAY_BYTES = 2**30  # of one array in an npz file, so that a small file cannot fill the memory


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def npz_names(path: Path) -> list[str]:
    """Lists the arrays of an npz file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no npz file.
    """
    with _opened(path) as members:
        return list(members)


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Reads those of some arrays that an npz file has. Pickled objects are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no npz file, or one of these arrays is damaged or has more than MAX_ARRAY_BYTES.
    """
    with _opened(path) as members:
        return {name: members[name]() for name in names if name in members}


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """Gives a function for each array that reads it; damaged files make NumPy and zipfile raise many types."""

    def read(info: zipfile.ZipInfo) -> np.ndarray:
        if info.file_size > MAX_ARRAY_BYTES:
            raise ValueError(f"an array unpacks to {info.file_size:,} bytes, expected at most {MAX_ARRAY_BYTES:,}")
        with archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    try:
        with zipfile.ZipFile(path) as archive:
            yield {info.filename.removesuffix(".npy"): partial(read, info) for info in archive.infolist()}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an npz file: {error}") from error
