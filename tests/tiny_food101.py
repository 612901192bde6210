"""A tiny archive in Food-101's layout, made of random pictures."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def jpeg(seed, size=(20, 16), mode="RGB", **options):
    """A photograph-like JPEG: a smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def tiny_food101():
    """{member name: bytes} of an archive with two classes of 4 train and 2 test images, and an empty one.

    The classes stand in Food-101's own order, which is not the sorted one.
    """
    names = ("cheesecake", "cheese_plate", "waffles")
    ids = {
        split: {name: [f"{name}/{start + i}" for i in range(count)] for name in names[:2]}
        for split, start, count in (("train", 100, 4), ("test", 900, 2))
    }
    meta = {
        "food-101/meta/classes.txt": "\n".join(names).encode() + b"\n",
        **{f"food-101/meta/{split}.json": json.dumps(of_split).encode() for split, of_split in ids.items()},
    }
    listed = [one for of_split in ids.values() for of_class in of_split.values() for one in of_class]
    return meta | {f"food-101/images/{one}.jpg": jpeg(seed) for seed, one in enumerate(listed)}


def write_tar(path, members, mode="w:gz"):
    """Writes {name: bytes, or a TarInfo without data} as an archive."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_folder(root, members):
    for name, content in members.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root
