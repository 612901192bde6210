"""What every source is, and the checks that all of them share. Owns no data set."""

import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

SPLITS = ("train", "test")

MAX_FILE_BYTES = 32 * 2**20  # per encoded image; a photograph of Food-101 has about 50 kB
MAX_NAME_BYTES = 200  # of a class or image name in UTF-8; file systems take 255, and names get suffixes
MAX_PIXELS = 50_000_000  # per image; checked before decoding, so that a small file cannot fill the memory
FORMATS = ("JPEG", "PNG", "WEBP")


class Split(NamedTuple):
    """The examples of one split, in an order that depends on the data set alone: sorted by id.

    Attributes:
        ids: a name per example, for messages and for the order.
        labels: a class id per example, an index into the source's class names.
        read: starts one pass over the examples and yields (position in ids, function that decodes the image)
            for each of them once, in the order in which the storage is read best. The function may run in any
            thread; it raises ValueError or OSError where the image is unreadable.
    """

    ids: Sequence[str]
    labels: Sequence[int]
    read: Callable[[], Iterator[tuple[int, Callable[[], Image.Image]]]]


@dataclass(frozen=True)
class Source:
    """A labelled set of images with the splits "train" and "test".

    Attributes:
        name: the source's name in the config.
        identity: what makes these data what they are, cheap to compute and JSON-able; it changes when the
            data change.
        load_class_names: reads the class names in the data set's own order.
        load_split: reads the list of the examples of "train" or "test".
    """

    name: str
    identity: Mapping[str, Any]
    load_class_names: Callable[[], tuple[str, ...]]
    load_split: Callable[[str], Split]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names in the data set's own order; a label is an index into them."""
        return self.load_class_names()

    def split(self, name: str) -> Split:
        """Lists the examples of one split.

        Raises:
            ValueError: no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; expected one of {', '.join(SPLITS)}")
        return self.load_split(name)


def checked_name(name: str, what: str) -> str:
    """Returns a class or image name that is safe to print and to use in a path.

    Raises:
        ValueError: the name is empty, a path, too long for a file's, or has characters that a terminal does not print
            as they are.
    """
    if not name.isprintable() or name != name.strip() or name in ("", ".", "..") or set(name) & set("/\\"):
        raise ValueError(
            f"{what} {name[:100]!a} is not allowed: expected printable characters, no path, no space at the ends"
        )
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        raise ValueError(
            f"{what} {name[:100]!a}... is not allowed: it has {size:,} bytes, expected at most {MAX_NAME_BYTES}"
        )
    return name


def checked_class_names(names: Iterable[str], where: Path) -> tuple[str, ...]:
    """Returns class names that are safe, distinct and at least one.

    Two spellings of one name in Unicode are not distinct: they print alike, and some file systems take them for one.

    Raises:
        ValueError: they are not.
    """
    names = tuple(checked_name(name, f"{where}: class name") for name in names)
    spelt_alike = Counter(unicodedata.normalize("NFC", name) for name in names)
    twice = sorted(name for name, count in spelt_alike.items() if count > 1)
    if not names or twice:
        raise ValueError(f"{where}: expected distinct class names, got {f'{some(twice)} twice' if names else 'none'}")
    return names


def read_class_names(path: Path) -> tuple[str, ...]:
    """Reads a text file with one class name per line, in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or the names are not safe, distinct and at least one.
    """
    with open(path, "rb") as file:
        return parse_class_names(file.read(MAX_FILE_BYTES + 1), path)


def parse_class_names(content: bytes, where: Path) -> tuple[str, ...]:
    """Reads the class names from the content of a file, see `read_class_names`."""
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{where}: the list of class names has more than {MAX_FILE_BYTES:,} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the list of class names is not text in UTF-8: {error}") from error
    return checked_class_names(text.splitlines(), where)


def required_path(path: str | os.PathLike | None, source: str, expected: str) -> Path:
    """Returns the path that a source reads.

    Raises:
        ValueError: no path is given.
        FileNotFoundError: there is nothing at the path.
    """
    if path is None:
        raise ValueError(f"the data source {source!r} needs config.data.path: {expected}")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"config.data.path {path} does not exist; the source {source!r} expects {expected}")
    return path


def fingerprint(folders: Iterable[Path]) -> str:
    """SHA-256 of the names, sizes and modification times of all files in some folders; reads no file."""

    def stop(error: OSError) -> None:
        raise error

    lines = []
    for folder in folders:
        for parent, _, names in os.walk(folder, onerror=stop, followlinks=True):
            for name in names:
                file = os.path.join(parent, name)
                status = os.stat(file)
                where = os.path.join(folder.name, os.path.relpath(file, folder))
                lines.append(f"{where}\0{status.st_size}\0{status.st_mtime_ns}\n")
    return hashlib.sha256("".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def some(names: Sequence[str]) -> str:
    """Lists the first five of some names for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def read_image(path: Path) -> Image.Image:
    """Decodes an image file, see `open_image`."""
    with open(path, "rb") as file:
        return open_image(file.read(MAX_FILE_BYTES + 1))


def open_image(encoded: bytes) -> Image.Image:
    """Decodes a JPEG, PNG or WebP image whole.

    Args:
        encoded: the bytes of the file; at most MAX_FILE_BYTES + 1 of them are needed to see that it is too
            large.

    Raises:
        ValueError: the bytes are not such an image, are truncated, or are beyond MAX_FILE_BYTES or
            MAX_PIXELS.
    """
    if len(encoded) > MAX_FILE_BYTES:
        raise ValueError(f"the file has more than {MAX_FILE_BYTES:,} bytes")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            return image
    except UnidentifiedImageError:
        raise ValueError(f"not a {', '.join(FORMATS)} image") from None
    except Exception as error:  # Pillow's decoders raise nearly every type there is on hostile bytes
        raise ValueError(f"not a whole {', '.join(FORMATS)} image ({type(error).__name__}: {error})") from error
    raise ValueError(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
