"""Scores images that were made of others, against these others: a distance, and how alike each pair is."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fooddiff import processes
from fooddiff.arrays import Pixels
from fooddiff.commands.scorer import Measures, print_record
from fooddiff.eval import results
from fooddiff.eval.images import ImageSet
from fooddiff.eval.reconstruction import psnr, ssim
from fooddiff.files.hashes import sha256_of_json

log = logging.getLogger(__name__)

CHUNK = 64  # images that are in memory as float64 at once


def score_pairs(
    measures: Measures,
    made: Pixels,
    originals: ImageSet,
    *,
    kind: str,
    name: str,
    made_by: Mapping[str, Any],
    folder: Path,
    stem: str,
) -> dict:
    """Scores images, writes the record and prints its table.

    Args:
        measures: what, besides PSNR and SSIM.
        made: u8[n, h, w, 3].
        originals: what each of them was made of.
        kind: what these images are, in one word for their identity.
        name: the same for tables.
        made_by: JSON-able, everything that they depend on besides the originals.
        folder: receives the record.
        stem: what its name begins with; n and a hash of how it was scored follow.

    Returns:
        The record.
    """
    made_by = {**made_by, "of": originals.identity["sha256"]}
    identity = {"kind": kind, "sha256": sha256_of_json(made_by)}
    made_set = ImageSet(name, identity, made, originals.labels, originals.class_names)
    record = measures.evaluate(made_set, originals, made_by)
    real = originals.pixels[slice(0, len(made))]
    record["results"] += [asdict(_mean("PSNR [dB]", real, made, psnr)), asdict(_mean("SSIM", real, made, ssim))]
    extractor = measures.extractor
    how = [identity, extractor.weights.sha256, extractor.resize, *extractor.names, *sorted(measures.metrics)]
    how += [measures.kid_subsets, measures.kid_subset_size, measures.seed]
    path = folder / f"{stem}_n{len(made)}_{sha256_of_json(how)[:8]}.json"
    processes.on_first(lambda: results.write_record(path, record))
    log.info("%s:", name)
    print_record(record)
    log.info("wrote %s", path)
    return record


def _mean(metric: str, real: Pixels, made: Pixels, measure: Callable[[Pixels, Pixels], np.ndarray]) -> results.Result:
    """The mean over images with its standard error."""
    chunks = [slice(start, start + CHUNK) for start in range(0, len(made), CHUNK)]
    values = np.concatenate([measure(real[chunk], made[chunk]) for chunk in chunks])
    n = len(values)
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return results.Result(
        metric=metric, value=float(values.mean()), error=error, bias=None, jackknife=(), n=n, warnings=()
    )
