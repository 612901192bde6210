"""Curves made fit to be drawn: smoothed, and thinned out without losing a peak. Pure functions of arrays."""

import numpy as np

from fooddiff.report.runs import Curve

MAX_POINTS = 600  # of a drawn curve: about one per pixel
WINDOW = 0.02  # of a curve's records that a smoothed point averages


def smooth(curve: Curve) -> Curve:
    """The centred moving average over 2 % of the records, at least five; at the ends over those that there are."""
    half = max(2, round(len(curve.values) * WINDOW / 2))
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    index = np.arange(len(curve.values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(curve.values))
    return Curve(curve.steps, (sums[high] - sums[low]) / (high - low))


def thin(curve: Curve) -> Curve:
    """At most MAX_POINTS of a curve's points: the least and the greatest of every stretch, and the two ends."""
    if len(curve.steps) <= MAX_POINTS:
        return curve
    kept = {0, len(curve.steps) - 1}
    for stretch in np.array_split(np.arange(len(curve.steps)), MAX_POINTS // 2 - 1):
        values = curve.values[stretch]
        kept |= {int(stretch[values.argmin()]), int(stretch[values.argmax()])}
    index = sorted(kept)
    return Curve(curve.steps[index], curve.values[index])
