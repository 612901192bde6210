"""A split, decoded once: memory-mapped pixels and labels with a manifest. Owns the files of a cache folder.

`<cache_dir>/<source>-<split>-<size>px-<identity>/{images.npy, labels.npy, manifest.json}`, where <identity>
is a hash of the source's identity, the split and the preprocessing. The folder appears whole or not at all:
it is written under another name and renamed. Data that have vanished have no identity, so a cache is used
only while its source is there to be compared; the source `food101` is the exception that its versions allow.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from tqdm.auto import tqdm

from fooddiff.arrays import Int, Pixels
from fooddiff.data.ahead import ahead
from fooddiff.data.preprocess import RECIPE, to_pixels
from fooddiff.data.sources.source import SPLITS, Source, Split
from fooddiff.files.hashes import sha256_of_json
from fooddiff.files.lock import locked

log = logging.getLogger(__name__)

_FORMAT = 1
_CHUNK = 4096  # images that are copied or hashed at once


@dataclass(frozen=True)
class Dataset:
    """Images with labels, as they lie in a cache folder.

    Attributes:
        images: u8[N, size, size, 3], memory-mapped and read-only.
        labels: i32[N], indices into class_names.
        class_names: in the data set's own order.
        manifest: what the folder holds and where it came from; its "sha256" identifies pixels and labels.
    """

    images: np.memmap
    labels: np.ndarray
    class_names: tuple[str, ...]
    manifest: dict[str, Any]

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """Of what `take` gives for each example."""
        return self.images.shape[1:]

    def take(self, rows: Int[np.ndarray, " n"], mirrored: np.ndarray) -> Pixels:
        """Copies some images, u8[n, size, size, 3], and mirrors some of these left to right."""
        block = np.asarray(self.images)[rows]  # through a view: np.memmap's own indexing is slower
        block[mirrored] = block[mirrored, :, ::-1]
        return block


def load_dataset(
    source: Source, split: str, *, image_size: int, cache_dir: str | os.PathLike, max_unreadable: int = 0
) -> Dataset:
    """Opens the cache of a split, and builds it first if it is not there.

    Of several processes that start together one builds and the others wait for it. A build that fails or is
    killed leaves no cache; what a killed one had written is removed by the next build.

    Args:
        source: where the images come from.
        split: "train" or "test".
        image_size: the side of the images, in pixels, >= 1.
        cache_dir: the folder of all caches; created if it is missing.
        max_unreadable: how many images may be unreadable, >= 0; those are left out and named in the manifest.

    Returns:
        The data set, its images in the order of their sorted ids.

    Raises:
        ValueError: an argument is out of range, too many images are unreadable, the source is malformed, or
            the cache folder has been changed since it was written.
        OSError: the disk is full or cannot be written.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; expected one of {', '.join(SPLITS)}")
    if image_size < 1 or max_unreadable < 0:
        raise ValueError(
            f"expected config.data.image_size >= 1 and config.data.max_unreadable >= 0, got {image_size} and "
            f"{max_unreadable}"
        )
    content = {
        "format": _FORMAT,
        "source": {"name": source.name, **source.identity},
        "split": split,
        "preprocessing": {"image_size": image_size, **RECIPE},
    }
    identity = sha256_of_json(content)
    cache_dir = Path(cache_dir).expanduser()
    folder = cache_dir / f"{source.name}-{split}-{image_size}px-{identity[:12]}"
    if not folder.exists():
        with locked(cache_dir):
            if not folder.exists():
                _build(folder, source, content, max_unreadable)
    return _open(folder, content, max_unreadable)


def _build(folder: Path, source: Source, content: dict[str, Any], max_unreadable: int) -> None:
    """Writes the cache folder; its parent is locked."""
    # Under the lock no build of this machine is alive, so what an earlier one left can go. Other machines
    # that share the folder may not share the lock: theirs is left alone.
    prefix = f"partial-{socket.gethostname()}-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    split, image_size = content["split"], content["preprocessing"]["image_size"]
    log.info("Building the cache %s", folder)
    examples = source.split(split)
    required = len(examples.ids) * (image_size * image_size * 3 + 4) + 2**20
    free = shutil.disk_usage(folder.parent).free
    if free < required:
        raise _disk_full(folder.parent, f"needs {required / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
    partial = folder.with_name(prefix + secrets.token_hex(8))
    partial.mkdir()
    try:
        unreadable = _decode(
            partial / "images.npy", examples, image_size, description=f"{source.name} {split} {image_size}px"
        )
        _raise_if_unreadable(unreadable, max_unreadable, f"{len(examples.ids):,} images of {source.name} {split}")
        kept = np.array([row for row, example in enumerate(examples.ids) if example not in unreadable], np.int64)
        if not len(kept):
            raise ValueError(f"none of the {len(examples.ids):,} images of {source.name} {split} can be read")
        if unreadable:
            _keep(partial / "images.npy", kept)
        labels = np.array(examples.labels, np.int32)[kept]
        with open(partial / "labels.npy", "wb") as file:
            np.save(file, labels)
            _sync(file)
        class_names = source.class_names
        manifest = {
            **content,
            "class_names": list(class_names),
            "images": len(labels),
            "images_per_class": np.bincount(labels, minlength=len(class_names)).tolist(),
            "unreadable": unreadable,
            "sha256": _sha256(partial / "images.npy", labels),
            "pillow": PIL.__version__,
        }
        with open(partial / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=1)
            _sync(file)
        _sync_folder(partial)
        _publish(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder.parent, f"became full: {error.strerror}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("Built the cache %s: %d images, %d unreadable", folder, len(labels), len(unreadable))


def _decode(path: Path, examples: Split, image_size: int, *, description: str) -> dict[str, str]:
    """Decodes all images in parallel into an .npy file and returns why which ids could not be read."""
    shape = (len(examples.ids), image_size, image_size, 3)
    workers = os.cpu_count() or 1
    unreadable = {}
    written = 0
    with (
        open(path, "wb") as file,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=shape[0], desc=description, unit=" images", disable=None) as bar,
    ):
        start = _write_header(file, shape)
        results = (
            (row, pool.submit(lambda decode=decode: to_pixels(decode(), image_size))) for row, decode in examples.read()
        )
        for row, result in ahead(results, 4 * workers):
            try:
                pixels = result.result()
            except (ValueError, OSError) as error:
                unreadable[examples.ids[row]] = str(error)
                pixels = np.zeros(shape[1:], np.uint8)
            # Written, not mapped: on a full disk a write raises, but a mapped page kills the process.
            file.seek(start + row * pixels.nbytes)
            file.write(pixels.tobytes())
            written += 1
            bar.update()
        _sync(file)
    assert written == shape[0], f"the source gave {written} of {shape[0]} images"
    return dict(sorted(unreadable.items()))


def _keep(path: Path, rows: np.ndarray) -> None:
    """Rewrites an .npy file of images with some of its rows."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    shorter = path.with_name("kept.npy")
    with open(shorter, "wb") as file:
        _write_header(file, (len(rows), *images.shape[1:]))
        for start in range(0, len(rows), _CHUNK):
            file.write(images[rows[start : start + _CHUNK]].tobytes())
        _sync(file)
    os.replace(shorter, path)


def _write_header(file: IO, shape: tuple[int, ...]) -> int:
    """Writes the .npy header of a uint8 array and returns where its data begin."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _sha256(path: Path, labels: np.ndarray) -> str:
    """Hash of all pixels in order, followed by the labels as little-endian int32."""
    digest = hashlib.sha256()
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    for start in range(0, len(images), _CHUNK):
        digest.update(np.ascontiguousarray(images[start : start + _CHUNK]))
    digest.update(labels.astype("<i4").tobytes())
    return digest.hexdigest()


def _publish(partial: Path, folder: Path) -> None:
    """Renames the finished folder to its final name; if another machine was faster, its equal one stays."""
    try:
        os.rename(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync_folder(folder.parent)


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(cache_dir: Path, reason: str) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"No room for the image cache in {cache_dir}: it {reason}. Nothing was left there and no other cache "
        f"was touched. Free some room, or set config.data.cache_dir to a folder on another disk",
    )


def _raise_if_unreadable(unreadable: dict[str, str], max_unreadable: int, what: str) -> None:
    if len(unreadable) > max_unreadable:
        named = "".join(f"\n  {example}: {reason}" for example, reason in list(unreadable.items())[:10])
        rest = f"\n  and {len(unreadable) - 10:,} more" if len(unreadable) > 10 else ""
        raise ValueError(
            f"{len(unreadable):,} of {what} cannot be read, and config.data.max_unreadable allows "
            f"{max_unreadable}:{named}{rest}\nRepair these images, or raise config.data.max_unreadable to "
            f"leave them out"
        )


def _open(folder: Path, content: dict[str, Any], max_unreadable: int) -> Dataset:
    """Maps a cache folder after checking that its arrays are what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        size = content["preprocessing"]["image_size"]
        count, classes = manifest["images"], len(manifest["class_names"])
        _require(
            {key: manifest[key] for key in content} == json.loads(json.dumps(content)),
            "another source or recipe",
        )
        _require(images.dtype == np.uint8 and images.shape == (count, size, size, 3), f"images {images.shape}")
        _require(labels.dtype == np.int32 and labels.shape == (count,), f"labels {labels.shape} {labels.dtype}")
        _require(count > 0 and labels.min() >= 0 and labels.max() < classes, "labels out of range")
        _require(np.bincount(labels, minlength=classes).tolist() == manifest["images_per_class"], "other counts")
        _require(len(manifest["sha256"]) == 64 and isinstance(manifest["unreadable"], dict), "no SHA-256 or list")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(
            f"the image cache {folder} is not what its manifest says ({type(error).__name__}: {error}). "
            f"Delete that folder; it is built again at the next start"
        ) from error
    _raise_if_unreadable(manifest["unreadable"], max_unreadable, f"the images from which the cache {folder} was built")
    return Dataset(images, labels, tuple(manifest["class_names"]), manifest)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
