"""Sampling that survives an interruption: every finished batch is a file until all are there."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np

from fooddiff import processes
from fooddiff.arrays import Key, Params
from fooddiff.files.atomic import write_atomically
from fooddiff.sample.generate import Draw, draw_batches


def resumable_batches(
    draw: Draw,
    params: Params,
    key: Key,
    ids: np.ndarray,
    batch_size: int,
    *,
    folder: Path,
    after_batch: Callable[[], None],
) -> Iterator[np.ndarray]:
    """Draws like `draw_batches`, but reads the batches that an interrupted call has left in a folder.

    Args:
        draw: from `make_draw`.
        params: the weights.
        key: the seed's key.
        ids: int[N, 2], (class, index) of every sample.
        batch_size: a multiple of the number of devices.
        folder: holds the batches; belongs to these arguments alone. The caller deletes it when it has all of them.
        after_batch: called after a batch was drawn and stored; what it raises ends the sampling there.

    Yields:
        uint8[<= batch_size, h, w, c], in the order of `ids`.

    Raises:
        ValueError: a file in the folder is damaged.
    """
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(ids), batch_size):
        path = folder / f"{start:09d}.npy"
        if processes.first_says(path.exists()):
            yield _read(path, len(ids[start : start + batch_size]))
            continue
        (images,) = draw_batches(draw, params, key, ids[start : start + batch_size], batch_size)
        if processes.is_first():
            content = BytesIO()
            np.save(content, images)
            write_atomically(path, content.getvalue())
        after_batch()
        yield images


def _read(path: Path, n: int) -> np.ndarray:
    try:
        images = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
    if images.dtype != np.uint8 or len(images) != n:
        raise ValueError(f"{path} does not hold {n} images; delete it and run again")
    return images
