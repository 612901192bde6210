"""Runs the Inception network over images: sharded over all devices, in chunks that survive a kill.

Owns devices, batches and the chunk files. The files are the interface: what follows reads features and never
images.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from fooddiff import parallel
from fooddiff.arrays import Array, Float, Pixels
from fooddiff.chunks import stored_chunks
from fooddiff.eval import inception
from fooddiff.eval.resize import Resize
from fooddiff.xla import jit

CHUNK = 512
"""Images whose features share a file: what a killed evaluation loses at most."""

Features = dict[str, Float[np.ndarray, "n d"]]
"""Feature name -> f32[n, d] on the host."""

Extract = Callable[[Iterable[Pixels]], Iterator[Features]]
"""A stream of u8[n, h, w, 3] -> the features of the same images in the same order."""


class Images(Protocol):
    """What features are taken of: an ndarray, a memory map, or anything that decodes on access."""

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, rows: slice) -> Pixels:
        """Some images, u8[n, h, w, 3]."""


def make_extract(
    params: inception.Params,
    names: tuple[str, ...],
    *,
    resize: Resize,
    batch_size: int,
    devices: Sequence[jax.Device] | None = None,
) -> Extract:
    """Compiles the network once for a batch size and returns the function that streams images through it.

    A short batch is padded, so every batch runs the same program and an image's features do not depend on its
    neighbours. The next batch is on the devices while the host takes the last one.

    Args:
        params: from `weights.load_inception`, with the stages that `names` need.
        names: feature names, keys of `inception.DIMENSIONS`.
        resize: a rule of resize.py.
        batch_size: images per call of the network, over all devices together.
        devices: to share each batch; all of every process where None.

    Returns:
        The function.

    Raises:
        ValueError: the devices cannot divide the batch, or a feature does not exist.
    """
    inception.check_names(names)
    devices = jax.devices() if devices is None else devices
    if batch_size < 1 or batch_size % len(devices):
        raise ValueError(f"batch size {batch_size} is not a positive multiple of the {len(devices)} devices")
    mesh = parallel.make_mesh(devices)
    rows, everywhere = parallel.over_data(mesh), parallel.replicated(mesh)
    params = jax.device_put(params, everywhere)
    network = jit(
        functools.partial(inception.features, names=names, resize=resize),
        in_shardings=(everywhere, rows),
        out_shardings=everywhere,
    )

    def run(batch: np.ndarray) -> dict[str, Array]:
        padded = np.concatenate([batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)])
        return network(params, jax.device_put(padded, rows))

    def extract(images: Iterable[Pixels]) -> Iterator[Features]:
        running: deque[tuple[int, dict[str, Array]]] = deque()
        for batch in _split(images, batch_size):
            running.append((len(batch), run(batch)))
            if len(running) > 1:
                yield _fetch(*running.popleft())
        for n, out in running:
            yield _fetch(n, out)

    return extract


def feature_chunks(
    images: Images,
    extract: Extract,
    *,
    identity: dict,
    folder: Path,
    progress: Callable[[int], object],
    after_chunk: Callable[[], None],
) -> Iterator[Features]:
    """Features of all images, chunk by chunk; those that are in the folder are read (see `stored_chunks`).

    Args:
        images: n images.
        extract: from `make_extract`.
        identity: JSON-able; everything that the features depend on (images, weights, resize rule, feature
            names).
        folder: holds the chunks.
        progress: called with the number of images that are done, after every batch and every chunk that was read.
        after_chunk: called after a chunk was computed and stored; what it raises ends the evaluation there.

    Yields:
        The features of up to `CHUNK` images at a time, in order.

    Raises:
        ValueError: the folder belongs to another identity, or a chunk in it is damaged.
    """

    def compute(rows: slice) -> Features:
        batches, done = [], rows.start
        for batch in extract([images[rows]]):
            batches.append(batch)
            done += len(next(iter(batch.values())))
            progress(done)
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    done = 0
    for chunk in stored_chunks(len(images), CHUNK, compute, identity=identity, folder=folder, after_chunk=after_chunk):
        done += len(next(iter(chunk.values())))
        progress(done)
        yield chunk


def _split(images: Iterable[Pixels], batch_size: int) -> Iterator[np.ndarray]:
    for pixels in images:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"images must be uint8 [n, h, w, 3]; got {pixels.dtype} {list(pixels.shape)}")
        for start in range(0, len(pixels), batch_size):
            yield np.asarray(pixels[start : start + batch_size])


def _fetch(n: int, out: dict[str, Array]) -> Features:
    return {name: np.asarray(value)[:n] for name, value in out.items()}
