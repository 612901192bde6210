"""Work in chunks, every finished one a file: what is interrupted goes on at the first chunk that is missing."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fooddiff import processes
from fooddiff.files.atomic import write_atomically
from fooddiff.files.npz import write_npz

Chunk: TypeAlias = dict[str, np.ndarray]
"""Arrays by name, with one row for every item of the chunk."""


def stored_chunks(
    n: int,
    size: int,
    compute: Callable[[slice], Chunk],
    *,
    identity: Mapping[str, Any],
    folder: Path,
    after_chunk: Callable[[], None],
) -> Iterator[Chunk]:
    """Computes `n` items chunk by chunk; chunks that are on disk are read instead of computed.

    A chunk is a pure function of its items, and its file appears whole or not at all. So what was killed goes on at the
    first missing chunk and yields the same bits, and a second run computes nothing.

    Args:
        n: the number of items.
        size: items per chunk; the last one may have fewer.
        compute: rows -> their arrays.
        identity: JSON-able; everything that the arrays depend on.
        folder: holds the chunks and the identity.
        after_chunk: called after a chunk was computed and stored; what it raises ends the work there.

    Yields:
        The arrays of up to `size` items at a time, in order.

    Raises:
        ValueError: the folder belongs to another identity, or a chunk in it is damaged.
    """
    processes.on_first(lambda: _claim(folder, {**identity, "items": n, "chunk": size}))
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        path = folder / f"{start:09d}.npz"
        if processes.first_says(path.exists()):
            yield _read(path, rows.stop - start)
            continue
        chunk = compute(rows)
        if processes.is_first():
            write_npz(path, chunk)
        after_chunk()
        yield chunk


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    path = folder / "identity.json"
    text = json.dumps(identity, sort_keys=True, indent=1)
    if not path.exists():
        write_atomically(path, text.encode())
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{folder} belongs to something else (see {path}); give another folder or delete it")


def _read(path: Path, n: int) -> Chunk:
    try:
        with np.load(path, allow_pickle=False) as file:
            chunk = dict(file)
    except Exception as error:  # whatever NumPy and zipfile make of damaged bytes
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
    if {len(value) for value in chunk.values()} != {n}:
        raise ValueError(f"{path} does not hold {n} items; delete it and run again")
    return chunk
