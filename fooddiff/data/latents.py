"""A split, encoded once: memory-mapped latents of its images and of their mirror images. Owns the files of that cache.

`<cache_dir>/latents-<identity>/{latents.npy, manifest.json}`, where <identity> is a hash of the images, of the codec
and of whether there are mirror images. Chunks that are done lie in `chunks/` until all are, so that a build that was
killed goes on. The manifest is written last.
"""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fooddiff import processes
from fooddiff.arrays import Float, Int, Pixels
from fooddiff.chunks import stored_chunks
from fooddiff.data.cache import Dataset
from fooddiff.files.atomic import atomic_path, write_atomically
from fooddiff.files.hashes import sha256_of_json
from fooddiff.files.lock import locked

log = logging.getLogger(__name__)

_FORMAT = 1
_CHUNK = 512  # images that are encoded and stored at once


@dataclass(frozen=True)
class Latents:
    """Latents with labels.

    Attributes:
        images: f16[N, k, h, w, c] as they were encoded, memory-mapped and read-only; k is 2 with mirror images, else 1.
        labels: i32[N].
        mean: f32[c] over all images and positions, which `take` brings to 0.
        std: f32[c], which it brings to 1.
    """

    images: np.memmap
    labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """Of what `take` gives for each example."""
        return self.images.shape[2:]

    def take(self, rows: Int[np.ndarray, " n"], mirrored: np.ndarray) -> Float[np.ndarray, "n h w c"]:
        """Normalised latents of some images, of the mirror image where that is asked for: f32[n, h, w, c]."""
        chosen = np.asarray(self.images)[rows, mirrored.astype(int)]
        return (chosen.astype(np.float32) - self.mean) / self.std


def load_latents(
    dataset: Dataset, encode: Callable[[Pixels], np.ndarray], *, codec: Any, mirror: bool, cache_dir: Path
) -> Latents:
    """Opens the cache of a split's latents, and builds it first if it is not there.

    Of several trainings that start together one builds and the others wait for it.

    Args:
        dataset: the images.
        encode: u8[n, size, size, 3] -> f32[n, h, w, c], of any number of images; every process calls it.
        codec: JSON-able, all that decides what `encode` gives: the hash of its weights, its settings.
        mirror: encode the mirror images, too.
        cache_dir: the folder of all caches.

    Returns:
        The latents, with their own mean and standard deviation.

    Raises:
        ValueError: latents that are not finite in float16, or a channel of which all are equal; or the cache has been
            changed since it was written.
    """
    content = {"format": _FORMAT, "images": dataset.manifest["sha256"], "codec": codec, "mirror": mirror}
    folder = cache_dir / f"latents-{sha256_of_json(content)[:12]}"
    manifest = folder / "manifest.json"
    with ExitStack() as stack:
        if not processes.first_says(manifest.exists()):  # else it is left alone, and may be read-only
            processes.on_first(lambda: stack.enter_context(locked(folder)))
            if not processes.first_says(manifest.exists()):
                _build(folder, dataset, encode, content)
    return _open(folder, dataset, content)


def _build(folder: Path, dataset: Dataset, encode: Callable[[Pixels], np.ndarray], content: dict[str, Any]) -> None:
    n = len(dataset.images)

    def encoded(rows: slice) -> dict[str, np.ndarray]:
        pixels = dataset.images[rows]
        sides = [pixels, pixels[:, :, ::-1]] if content["mirror"] else [pixels]
        return {"latents": np.stack([encode(side) for side in sides], axis=1).astype(np.float16)}

    log.info("encoding %s images once, to %s", f"{n:,}", folder)
    chunks = folder / "chunks"
    with tqdm(total=n, unit="image", desc="latents", dynamic_ncols=True, disable=not processes.is_first()) as bar:
        for chunk in stored_chunks(n, _CHUNK, encoded, identity=content, folder=chunks, after_chunk=lambda: None):
            bar.update(len(chunk["latents"]))
    processes.on_first(lambda: _join(folder, chunks, n, content))


def _join(folder: Path, chunks: Path, n: int, content: dict[str, Any]) -> None:
    """Writes the chunks in one array, and what is known of it then; removes them."""
    total, squares, count = 0.0, 0.0, 0
    with atomic_path(folder / "latents.npy") as path, open(path, "wb") as file:
        for name in sorted(chunks.glob("*.npz")):
            with np.load(name, allow_pickle=False) as stored:
                latents = stored["latents"]
            if not count:
                header = {"descr": "<f2", "fortran_order": False, "shape": (n, *latents.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(latents.tobytes())
            exact = latents.astype(np.float64).reshape(-1, latents.shape[-1])
            total, squares, count = total + exact.sum(axis=0), squares + (exact**2).sum(axis=0), count + len(exact)
    mean = total / count
    variance = squares / count - mean**2
    if not (np.isfinite(mean).all() and (variance > 0).all()):
        shutil.rmtree(chunks)  # of a codec that is of no use
        raise ValueError(
            f"the latents of the training images cannot be normalised: their means are {mean.tolist()}, their "
            f"variances {variance.tolist()}. Train the autoencoder for longer, or with a larger weight of its KL"
        )
    manifest = {**content, "mean": mean.tolist(), "std": np.sqrt(variance).tolist()}
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    shutil.rmtree(chunks)


def _open(folder: Path, dataset: Dataset, content: dict[str, Any]) -> Latents:
    """Maps the cache after checking that the array is what the manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        images = np.load(folder / "latents.npy", mmap_mode="r", allow_pickle=False)
        mean, std = (np.array(manifest[name], np.float32) for name in ("mean", "std"))
        if {name: manifest[name] for name in content} != content:
            raise ValueError("it is of other images or of another codec")
        expected = (len(dataset.labels), 1 + content["mirror"], *images.shape[2:4], len(mean))
        if images.dtype != np.float16 or images.shape != expected or mean.shape != std.shape:
            raise ValueError(f"it holds {images.dtype} {images.shape}, expected float16 {expected}")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(
            f"the cache of latents {folder} is damaged ({error}). Delete that folder; it is built again at the next "
            f"start"
        ) from error
    return Latents(images, dataset.labels, mean, std)
