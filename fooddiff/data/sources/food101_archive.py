"""Food-101 as its authors publish it, `food-101.tar.gz` or the folder inside it, at any resolution.

The archive is never extracted: its members are read in one pass, as a stream. Owns the layout
`food-101/meta/{classes.txt,train.json,test.json}` and `food-101/images/<class>/<id>.jpg`.
"""

import gzip
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fooddiff.data.sources.source import (
    MAX_FILE_BYTES,
    SPLITS,
    Source,
    Split,
    checked_name,
    fingerprint,
    open_image,
    parse_class_names,
    read_image,
    required_path,
    some,
)

_ROOT = "food-101"
_META = ("classes.txt", *(f"{split}.json" for split in SPLITS))
_EXPECTED = (
    "food-101.tar.gz, a .tar of it, or the extracted folder with meta/{classes.txt,train.json,test.json} and "
    "images/<class>/<id>.jpg"
)
_DAMAGE = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    ValueError,
    OverflowError,
    RecursionError,
)


def archive(path: str | os.PathLike | None) -> Source:
    """Reads Food-101's own archive, packed or extracted.

    Args:
        path: `food-101.tar.gz`, an uncompressed `.tar` of it, the extracted folder `food-101`, or the folder
            around it.

    Returns:
        A source whose classes stand in the order of `meta/classes.txt`. A packed archive is identified by its
        size, modification time and the hash of its end, where gzip keeps a checksum of all its content; a
        folder by the names, sizes and modification times of its files.

    Raises:
        ValueError: no path is given, or what lies there does not have the layout of Food-101.
        FileNotFoundError: there is nothing at the path.
    """
    path = required_path(path, "archive", _EXPECTED)
    return _extracted(path) if path.is_dir() else _packed(path)


def _extracted(path: Path) -> Source:
    root = next((root for root in (path, path / _ROOT) if (root / "meta").is_dir()), None)
    if root is None or not (root / "images").is_dir():
        raise ValueError(f"{path} has no folders meta and images, nor has {path / _ROOT}; expected {_EXPECTED}")
    absent = [name for name in _META if not (root / "meta" / name).is_file()]
    if absent:
        raise ValueError(f"{root / 'meta'} has no {', '.join(absent)}; expected {_EXPECTED}")

    @cache
    def meta() -> _Meta:
        return _parse_meta(root, {name: (root / "meta" / name).read_bytes() for name in _META})

    def split(name: str) -> Split:
        ids, labels = meta().examples(name)
        files = [root / "images" / f"{example}.jpg" for example in ids]
        _raise_if_missing(root, [example for example, file in zip(ids, files, strict=True) if not file.is_file()])
        return Split(ids, labels, lambda: ((row, partial(read_image, file)) for row, file in enumerate(files)))

    return Source(
        name="archive",
        identity={"layout": "folder", "sha256_of_listing": fingerprint([root / "meta", root / "images"])},
        load_class_names=lambda: meta().class_names,
        load_split=split,
    )


def _packed(path: Path) -> Source:
    @cache
    def meta() -> _Meta:
        wanted = {f"{_ROOT}/meta/{name}": name for name in _META}
        found = {}
        for member, content in _members(path, wanted):
            found[wanted[member]] = content
            if len(found) == len(wanted):
                return _parse_meta(path, found)
        absent = [member for member, name in wanted.items() if name not in found]
        raise ValueError(f"{path} has no {', '.join(absent)}; expected {_EXPECTED}, or it is truncated")

    def split(name: str) -> Split:
        ids, labels = meta().examples(name)

        def read():
            rows = {f"{_ROOT}/images/{example}.jpg": row for row, example in enumerate(ids)}
            seen = set()
            for member, content in _members(path, rows):
                if member in seen:
                    raise ValueError(f"{path} holds {member} twice; get the archive again from where it came")
                seen.add(member)
                yield rows[member], partial(open_image, content)
            _raise_if_missing(path, [ids[row] for member, row in rows.items() if member not in seen])

        return Split(ids, labels, read)

    status = path.stat()
    with open(path, "rb") as file:
        file.seek(max(0, status.st_size - 2**20))
        end = hashlib.sha256(file.read()).hexdigest()
    return Source(
        name="archive",
        identity={
            "layout": "tar",
            "file": path.name,
            "bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,
            "sha256_of_last_mebibyte": end,
        },
        load_class_names=lambda: meta().class_names,
        load_split=split,
    )


class _Meta(NamedTuple):
    """The class names in their order and the sorted ids `<class>/<name>` of each split."""

    class_names: tuple[str, ...]
    ids: dict[str, list[str]]

    def examples(self, split: str) -> tuple[list[str], list[int]]:
        label = {name: index for index, name in enumerate(self.class_names)}
        return self.ids[split], [label[example.split("/")[0]] for example in self.ids[split]]


def _parse_meta(where: Path, files: dict[str, bytes]) -> _Meta:
    large = [name for name, content in files.items() if len(content) > MAX_FILE_BYTES]
    if large:
        raise ValueError(f"{where}: {', '.join(large)} of food-101/meta has more than {MAX_FILE_BYTES:,} bytes")
    try:
        listed = {split: json.loads(files[f"{split}.json"].decode()) for split in SPLITS}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: a file of food-101/meta is not the JSON it should be: {error}") from error
    class_names = parse_class_names(files["classes.txt"], where)
    return _Meta(class_names, {split: _parse_ids(where, split, listed[split], class_names) for split in SPLITS})


def _parse_ids(where: Path, split: str, listed: object, class_names: tuple[str, ...]) -> list[str]:
    """Checks what a split's JSON lists, {"<class>": ["<class>/<name>", ...]}, and sorts its ids."""
    if not isinstance(listed, dict) or not all(isinstance(ids, list) for ids in listed.values()):
        raise ValueError(f'{where}: meta/{split}.json is not of the form {{"<class>": ["<class>/<name>", ...]}}')
    unknown = sorted(ascii(name[:100]) for name in set(listed) - set(class_names))
    if unknown:
        raise ValueError(f"{where}: meta/{split}.json has classes that classes.txt lacks: {some(unknown)}")
    ids = []
    for class_name, examples in listed.items():
        for example in examples:
            if not isinstance(example, str) or not example.startswith(f"{class_name}/"):
                raise ValueError(
                    f"{where}: meta/{split}.json lists {str(example)[:100]!a} under {class_name}; "
                    f"expected {class_name}/<name>"
                )
            checked_name(example.removeprefix(f"{class_name}/"), f"{where}: image name")
            ids.append(example)
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{where}: meta/{split}.json lists {'an image twice' if ids else 'no images'}")
    return sorted(ids)


def _raise_if_missing(where: Path, missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"{where}: {len(missing):,} images that food-101/meta lists are missing: {some(missing)}. The "
            f"copy is incomplete: get it again, or list only what is there in meta/train.json and "
            f"meta/test.json"
        )


def _members(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Streams the wanted regular members of a tar or tar.gz, each cut off just above MAX_FILE_BYTES.

    Nothing is written to disk, so names that lead elsewhere, links and devices are no danger: they are not
    wanted. Memory stays bounded whatever the headers claim. The stream is read to its end, where gzip's
    checksum is verified.

    Raises:
        ValueError: the file is no tar archive, or it is damaged or truncated.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = _ForwardStream(gzip.GzipFile(fileobj=file) if packed else file)
            archive = tarfile.TarFile(fileobj=stream, mode="r")
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would remember every header
                name = member.name.removeprefix("./")
                if name in wanted and member.isreg() and not member.issparse():
                    content = stream.read(min(member.size, MAX_FILE_BYTES + 1))
                    if len(content) < min(member.size, MAX_FILE_BYTES + 1):
                        raise EOFError(f"it ends within {name}")
                    yield name, content
            while stream.read(2**20):
                pass
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is not a whole tar or tar.gz archive: {error}. It has {path.stat().st_size:,} bytes; "
            f"Food-101's own food-101.tar.gz has 4,996,278,331. Get it again"
        ) from error


class _ForwardStream:
    """The file that tarfile needs, over a stream that is only read forward and never much at once."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._position = 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_FILE_BYTES + 1:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        data = self._stream.read(size)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        while self._position < position:
            if not self.read(min(2**20, position - self._position)):
                raise EOFError("it ends within a member")
