"""Scores images that were made of others, against these others: a distance, and how alike each pair is."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fooddiff import processes
from fooddiff.arrays import Array, Float, Pixels
from fooddiff.commands import scorer
from fooddiff.eval import results
from fooddiff.eval.evaluate import Extractor, evaluate
from fooddiff.eval.images import ImageSet
from fooddiff.eval.reconstruction import psnr, ssim
from fooddiff.files.hashes import sha256_of_json
from fooddiff.runs import workdir as workdirs

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PairScoring:
    """How such images are scored.

    Attributes:
        extractor: features.
        metrics: of `fooddiff.eval.evaluate.METRICS`, besides PSNR and SSIM.
        kid_subsets: subsets of the kernel distance's second figure.
        kid_subset_size: their size.
        seed: of the draws of those subsets.
    """

    extractor: Extractor
    metrics: Sequence[str]
    kid_subsets: int
    kid_subset_size: int
    seed: int


def score_pairs(
    scoring: PairScoring,
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
        scoring: how.
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
    extractor = scoring.extractor
    made_by = {**made_by, "of": originals.identity["sha256"]}
    identity = {"kind": kind, "sha256": sha256_of_json(made_by)}
    record = evaluate(
        ImageSet(name, identity, made, originals.labels, originals.class_names),
        originals,
        extractor,
        metrics=tuple(scoring.metrics),
        kid_subsets=scoring.kid_subsets,
        kid_subset_size=scoring.kid_subset_size,
        seed=scoring.seed,
        made_by=made_by,
        versions=workdirs.versions(),
    )
    real = originals.pixels[slice(0, len(made))]
    record["results"] += [asdict(_mean("PSNR [dB]", psnr(real, made))), asdict(_mean("SSIM", ssim(real, made)))]
    how = [identity, extractor.weights.sha256, extractor.resize, *extractor.names, *sorted(scoring.metrics)]
    path = folder / f"{stem}_n{len(made)}_{sha256_of_json(how)[:8]}.json"
    processes.on_first(lambda: results.write_record(path, record))
    log.info("%s:", name)
    scorer.print_record(record)
    log.info("wrote %s", path)
    return record


def in_batches(apply: Callable[[Pixels], Array], images: Pixels, batch_size: int) -> np.ndarray:
    """Applies a compiled function to any number of images at one batch size; the last batch is padded and cut."""
    batches = []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        padded = np.resize(chunk, (batch_size, *chunk.shape[1:]))
        batches.append(np.asarray(apply(padded))[: len(chunk)])
    return np.concatenate(batches)


def _mean(metric: str, values: Float[np.ndarray, " n"]) -> results.Result:
    """The mean over images with its standard error."""
    n = len(values)
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return results.Result(
        metric=metric, value=float(values.mean()), error=error, bias=None, jackknife=(), n=n, warnings=()
    )
