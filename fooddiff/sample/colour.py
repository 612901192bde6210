"""The spread of the mean colour: the cheapest sign that a model's images are tinted, or all alike."""

import numpy as np

from fooddiff.arrays import Float, UInt8

SUSPICIOUS = 1.5  # a spread that is off by this factor from that of the data


def colour_spread(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " 3"]:
    """Standard deviation over images of their mean red, green and blue, in grey levels."""
    return images.reshape(len(images), -1, 3).mean(axis=1, dtype=np.float64).std(axis=0)


def is_suspicious(ratio: float) -> bool:
    """Whether the ratio of two spreads is off by `SUSPICIOUS`, one way or the other."""
    return not 1 / SUSPICIOUS < ratio < SUSPICIOUS
