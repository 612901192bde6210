"""Opens what a user names on the command line as a set of images: a folder, an npz file or a data source.

Owns those three readers and what identifies each set. Pixels are decoded when they are asked for, so memory
does not grow with the number of images.
"""

import hashlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fooddiff.arrays import Pixels
from fooddiff.data.cache import load_dataset
from fooddiff.data.preprocess import to_rgb
from fooddiff.data.sources import SPLITS, Source
from fooddiff.data.sources.source import MAX_PIXELS, read_image, some
from fooddiff.eval.extract import Images
from fooddiff.files.hashes import sha256_of
from fooddiff.files.npz import npz_names, read_npz

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class ImageSet:
    """Images with a name for tables and an identity for provenance.

    Attributes:
        name: short, for a person.
        identity: JSON-able: the kind, where it was read from, and a "sha256" of its content.
        pixels: u8[n, h, w, 3] on access.
        labels: i64[n] class ids, or None where the set has none.
        class_names: in the order of the ids, or None.
    """

    name: str
    identity: dict
    pixels: Images
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None

    def class_counts(self) -> dict[str, int] | None:
        """Number of images of every class, by name where names are known; None without labels."""
        if self.labels is None:
            return None
        ids, counts = np.unique(self.labels, return_counts=True)
        names = [self.class_names[i] if self.class_names else str(i) for i in ids.tolist()]
        return dict(zip(names, counts.tolist(), strict=True))

    def describe(self) -> dict:
        """What a record says of the set, JSON-able."""
        return {
            "name": self.name,
            "identity": self.identity,
            "n": len(self.pixels),
            "n_per_class": self.class_counts(),
        }


class FolderImages:
    """Image files that are decoded on access, in threads."""

    def __init__(self, files: Sequence[Path]):
        """Takes the files in their order; the first one's size is everyone's."""
        self.files = files
        self.shape = _decode(files[0]).shape

    def __len__(self) -> int:
        """The number of files."""
        return len(self.files)

    def __getitem__(self, rows: slice) -> Pixels:
        """Decodes some files: u8[n, h, w, 3].

        Raises:
            ValueError: a file is not readable or differs in size from the first.
        """
        files = self.files[rows]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(_decode, files))
        for file, image in zip(files, images, strict=True):
            if image.shape != self.shape:
                raise ValueError(
                    f"{file} is {image.shape[1]}x{image.shape[0]} but {self.files[0]} is "
                    f"{self.shape[1]}x{self.shape[0]}; the images of a set must have one size"
                )
        return np.stack(images)


class NpzImages:
    """The array `arr_0` of an npz file, read from the file on access."""

    def __init__(self, path: Path):
        """Reads the header of the array.

        Raises:
            ValueError: there is no such array, or it is not uint8 [n, h, w, 3].
        """
        self.path = path
        with self._opened() as (file, size):
            first = np.lib.format.read_magic(file) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            self.shape, fortran_order, dtype = read_header(file)
            self.start = file.tell()
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or fortran_order or min(self.shape) < 1:
            raise ValueError(
                f"{path}: arr_0 is {dtype} {list(self.shape)}; images are uint8 [n >= 1, h, w, 3] in C order"
            )
        if math.prod(self.shape[1:3]) > MAX_PIXELS:
            raise ValueError(f"{path}: images of {self.shape[2]} x {self.shape[1]} are more than {MAX_PIXELS:,} pixels")
        if size != self.start + math.prod(self.shape):
            raise ValueError(f"{path}: arr_0 claims {self.shape[0]:,} images, but has {size:,} bytes; it is damaged")

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], int]]:
        """The array's file and its size in bytes."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                yield file, archive.getinfo("arr_0.npy").file_size
        except Exception as error:  # damaged zip files make the zip, zlib and NumPy modules raise many types
            raise ValueError(f"{self.path} is damaged: arr_0 cannot be read ({error})") from error

    def __len__(self) -> int:
        """The number of images."""
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Pixels:
        """Reads some images: u8[n, h, w, 3].

        Raises:
            ValueError: the file is truncated or damaged.
        """
        start, stop, _ = rows.indices(len(self))
        size = int(np.prod(self.shape[1:]))
        with self._opened() as (file, _):
            file.seek(self.start + start * size)
            content = file.read((stop - start) * size)
        if len(content) != (stop - start) * size:
            raise ValueError(f"{self.path} ends before image {stop - 1} of {len(self)}; it is truncated")
        return np.frombuffer(content, np.uint8).reshape(-1, *self.shape[1:])


def open_images(
    spec: str,
    *,
    sources: Mapping[str, Callable[[str | None], Source]],
    image_size: int,
    cache_dir: str | os.PathLike,
) -> ImageSet:
    """Opens a set of images.

    Args:
        spec: a folder of images (searched in depth, in the order of their paths), an npz file with `arr_0`
            and optionally integer labels `arr_1`, or `SOURCE:PATH:SPLIT`, for instance
            `archive:food-101.tar.gz:test` or `digits::train`.
        sources: the data sources by name; each is called with the path.
        image_size: side in pixels to which a data source is brought; other images keep their size.
        cache_dir: where a data source keeps its decoded images.

    Returns:
        The set.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: what is there cannot be read as images of one size.
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind in sources:
        return _open_source(spec, sources[kind], rest, image_size, cache_dir)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{spec} does not exist; give a folder of images, an npz file, or SOURCE:PATH:SPLIT with one "
            f"of the sources {', '.join(sources)}"
        )
    if path.suffix != ".npz":
        raise ValueError(f"{spec} is neither a folder nor an .npz file")
    return _open_npz(path)


def images_in(path: Path) -> ImageSet | None:
    """The images in an npz file that holds statistics, as guided-diffusion's references may; None if it has none."""
    return _open_npz(path) if "arr_0" in npz_names(path) else None


def _open_source(spec: str, source: Callable, rest: str, image_size: int, cache_dir: str | os.PathLike) -> ImageSet:
    path, colon, split = rest.rpartition(":")
    if not colon or split not in SPLITS:
        raise ValueError(f"{spec!r} does not end in {' or '.join(SPLITS)}; write SOURCE:PATH:SPLIT")
    data = load_dataset(source(path or None), split, image_size=image_size, cache_dir=cache_dir)
    name = f"{spec.partition(':')[0]} {split}"
    identity = {"kind": "source", "spec": spec, "size": image_size, "sha256": data.manifest["sha256"]}
    return ImageSet(name, identity, data.images, np.asarray(data.labels), tuple(data.class_names))


def _open_folder(path: Path) -> ImageSet:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)}), in it or below")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode(errors="surrogateescape"))
    identity = {"kind": "folder", "path": str(path), "sha256": digest.hexdigest()}
    return ImageSet(path.name, identity, FolderImages(files), None, None)


def _open_npz(path: Path) -> ImageSet:
    names = npz_names(path)
    if "arr_0" not in names:
        shown = some([ascii(name) for name in names]) or "nothing"
        raise ValueError(f"{path} holds {shown}; images are the array arr_0, uint8 [n, h, w, 3]")
    pixels = NpzImages(path)
    labels = read_npz(path, ["arr_1"]).get("arr_1")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(pixels),)):
        raise ValueError(f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}; labels are integers [{len(pixels)}]")
    identity = {"kind": "npz", "path": str(path), "sha256": sha256_of(path)}
    return ImageSet(path.stem, identity, pixels, labels, None)


def _decode(file: Path) -> np.ndarray:
    try:
        return np.array(to_rgb(read_image(file)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is unreadable: {error}") from error
