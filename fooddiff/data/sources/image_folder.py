"""Images in folders: `<split>/<class>/<image>`. Owns that layout."""

import os
from functools import partial
from pathlib import Path

from fooddiff.data.sources.source import (
    SPLITS,
    Source,
    Split,
    checked_class_names,
    checked_name,
    fingerprint,
    read_class_names,
    read_image,
    required_path,
    some,
)

_EXPECTED = "a folder with train/<class>/<image> and test/<class>/<image>"


def folder(path: str | os.PathLike | None) -> Source:
    """Reads a folder of images, one subfolder per split and in it one per class.

    Names that begin with a dot are ignored.

    Args:
        path: the folder that holds `train` and `test`. If it has a file `classes.txt`, one name per line,
            that gives the order of the classes; otherwise they are sorted by code point. Images of Food-101
            need the file of the original archive for its own order, in which `cheesecake` comes before
            `cheese_plate`.

    Returns:
        A source that is identified by the names, sizes and modification times of its files.

    Raises:
        ValueError: no path is given, or the folder has another layout.
        FileNotFoundError: there is nothing at the path.
    """
    root = required_path(path, "folder", _EXPECTED)
    present = [root / split for split in SPLITS if (root / split).is_dir()]
    if not present:
        raise ValueError(f"{root} has no folder train or test; expected {_EXPECTED}")
    class_names = _class_names(root, present)

    def split(name: str) -> Split:
        if not (root / name).is_dir():
            raise FileNotFoundError(f"{root / name} does not exist; expected {_EXPECTED}")
        found = {}
        for label, class_name in enumerate(class_names):
            for file in _visible(root / name / class_name):
                if not file.is_file():
                    raise ValueError(f"{file} is not a file; expected {_EXPECTED}")
                found[f"{class_name}/{checked_name(file.name, f'{file.parent}: image name')}"] = (label, file)
        if not found:
            raise ValueError(f"{root / name} holds no images; expected {_EXPECTED}")
        ids = sorted(found)
        files = [found[example][1] for example in ids]
        return Split(
            ids=ids,
            labels=[found[example][0] for example in ids],
            read=lambda: ((row, partial(read_image, file)) for row, file in enumerate(files)),
        )

    return Source(
        name="folder",
        identity={"class_names": list(class_names), "sha256_of_listing": fingerprint(present)},
        load_class_names=lambda: class_names,
        load_split=split,
    )


def _class_names(root: Path, present: list[Path]) -> tuple[str, ...]:
    found = {entry.name for split in present for entry in _visible(split) if entry.is_dir()}
    order = root / "classes.txt"
    if not order.is_file():
        return checked_class_names(sorted(found), root)
    names = read_class_names(order)
    unknown = sorted(ascii(name) for name in found - set(names))
    if unknown:
        raise ValueError(f"{root} has classes that {order} lacks: {some(unknown)}")
    return names


def _visible(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(".")] if path.is_dir() else []
