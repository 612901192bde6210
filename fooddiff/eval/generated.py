"""The images of a trained model as a set to be scored: drawn when they are asked for, and never written as pictures.

Since features are kept chunk by chunk, an evaluation that was killed draws only the samples that are missing.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Mapping

import numpy as np

from fooddiff.arrays import Key, Params, Pixels
from fooddiff.eval.images import ImageSet
from fooddiff.sample.generate import Draw, draw_batches


class GeneratedImages:
    """Samples on access: u8[n, h, w, 3] for a slice of sample ids."""

    def __init__(self, draw: Draw, params: Params, key: Key, ids: np.ndarray, batch_size: int, *, keep: bool = False):
        """Stores what the samples are a function of; see `draw_batches`.

        Args:
            draw: the compiled sampler.
            params: what it takes.
            key: of all samples.
            ids: int[n, 2], (class, index).
            batch_size: samples per call.
            keep: samples that were drawn stay in memory, for whoever asks for the same slice again.
        """
        self._draw, self._params, self._key, self._ids, self._batch_size = draw, params, key, ids, batch_size
        self._seconds: list[float] = []  # of every batch that was drawn
        self._kept: dict[tuple[int, int, int], Pixels] | None = {} if keep else None

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._ids)

    def __getitem__(self, rows: slice) -> Pixels:
        """Draws some samples."""
        if self._kept is None:
            return self._drawn(rows)
        if (place := rows.indices(len(self))) not in self._kept:
            self._kept[place] = self._drawn(rows)
        return self._kept[place]

    def _drawn(self, rows: slice) -> Pixels:
        drawn = draw_batches(self._draw, self._params, self._key, self._ids[rows], self._batch_size)
        batches, begun = [], time.perf_counter()
        for batch in drawn:
            batches.append(batch)
            self._seconds.append(time.perf_counter() - begun)
            begun = time.perf_counter()
        return np.concatenate(batches)

    def seconds_per_image(self) -> float | None:
        """What drawing took, as the median over batches; None before the second one, since the first compiles."""
        return statistics.median(self._seconds[1:]) / self._batch_size if len(self._seconds) > 1 else None


def generated_set(
    images: GeneratedImages, ids: np.ndarray, class_names: tuple[str, ...], name: str, made_by: Mapping
) -> ImageSet:
    """Names a set of samples.

    Args:
        images: the samples.
        ids: int[n, 2], their (class, index).
        class_names: in the order of class ids.
        name: for tables.
        made_by: JSON-able, everything the samples depend on but their ids; its hash is the identity of the set.

    Returns:
        The set.
    """
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode() + np.ascontiguousarray(ids).tobytes())
    return ImageSet(name, {"kind": "generated", "sha256": digest.hexdigest()}, images, ids[:, 0], class_names)


def ids_like(labels: np.ndarray) -> np.ndarray:
    """Sample ids with exactly as many samples of every class as `labels` has: int32[n, 2], class by class."""
    classes, counts = np.unique(labels, return_counts=True)
    return np.array([(y, i) for y, count in zip(classes, counts, strict=True) for i in range(count)], np.int32)
