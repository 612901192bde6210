"""Scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the package."""

import hashlib

import numpy as np
from PIL import Image

from fooddiff.data.sources.source import Source, Split

_TRAIN = 1437  # scikit-learn's own classification example holds out the last fifth, unshuffled


def digits(path: None = None) -> Source:
    """Gives the 8x8 digits that scikit-learn packs (UCI, "Optical Recognition of Handwritten Digits").

    Split: the first 1,437 images are "train" and the last 360 "test"; they were written by different people.
    A grey level g of 0..16 becomes round(255 g / 16), the same in red, green and blue.

    Args:
        path: None. The digits lie in the installed package.

    Raises:
        ValueError: a path is given.
    """
    if path is not None:
        raise ValueError(
            f"the data source 'digits' comes with scikit-learn and takes no config.data.path, got {path!r}"
        )
    from sklearn.datasets import (
        load_digits,
    )  # imported here: it takes a second that other sources need not spend

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.tolist()
    class_names = tuple(str(name) for name in data.target_names)

    def split(name: str) -> Split:
        rows = range(_TRAIN) if name == "train" else range(_TRAIN, len(pixels))
        return Split(
            ids=[f"{row:04d}" for row in rows],
            labels=[labels[row] for row in rows],
            read=lambda: ((i, lambda row=row: Image.fromarray(pixels[row])) for i, row in enumerate(rows)),
        )

    return Source(
        name="digits",
        identity={
            "train_images": _TRAIN,
            "sha256": hashlib.sha256(pixels.tobytes() + bytes(labels)).hexdigest(),
        },
        load_class_names=lambda: class_names,
        load_split=split,
    )
