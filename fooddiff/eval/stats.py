"""Mean and covariance of features: running sums that merge, the statistics they end in, and their files.

Owns the float64 arithmetic on the host and the `mu, sigma` npz format. Knows neither images nor networks.
"""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fooddiff.arrays import Array, Float
from fooddiff.files.npz import read_npz, write_npz


class Stats(NamedTuple):
    """Mean and unbiased covariance of a set of feature vectors."""

    n: int | None  # None: a statistics file that does not say
    mean: Float[np.ndarray, " d"]  # float64
    cov: Float[np.ndarray, "d d"]  # float64


class Sums(NamedTuple):
    """What is kept of a stream of feature vectors: its size does not depend on n, and two of them add up."""

    n: int
    total: Float[np.ndarray, " d"]  # float64, sum of f
    outer: Float[np.ndarray, "d d"]  # float64, sum of f f'


GROUPS = 20
"""Into how many groups `grouped_sums` deals the examples: 8 d^2 GROUPS bytes, 0.67 GB for d = 2048."""


def sums_of(features: Float[Array, "n d"]) -> Sums:
    """Sums of one batch.

    Args:
        features: f32 or f64 [n, d], n >= 0.

    Returns:
        The sums in float64.

    Raises:
        ValueError: a feature is NaN or infinite.
    """
    f = np.asarray(features, np.float64)
    if not np.isfinite(f).all():
        bad = int(np.flatnonzero(~np.isfinite(f).all(axis=1))[0])
        raise ValueError(f"the features of image {bad} of this batch are not finite; check the weights and the image")
    return Sums(len(f), f.sum(axis=0), f.T @ f)


def merge(a: Sums, b: Sums) -> Sums:
    """Sums of the union of two disjoint sets."""
    return Sums(a.n + b.n, a.total + b.total, a.outer + b.outer)


def finish(sums: Sums) -> Stats:
    """Mean and unbiased covariance, (sum f f' - n mu mu') / (n - 1).

    Args:
        sums: of at least two examples.

    Returns:
        The statistics.

    Raises:
        ValueError: fewer than two examples have no covariance.
    """
    if sums.n < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {sums.n}")
    mean = sums.total / sums.n
    cov = (sums.outer - sums.n * np.outer(mean, mean)) / (sums.n - 1)
    return Stats(sums.n, mean, (cov + cov.T) / 2)


def grouped_sums(batches: Iterable[Float[Array, "n d"]]) -> tuple[Sums, ...]:
    """Deals a stream of feature vectors into groups: example i goes to group i mod GROUPS.

    The groups are exchangeable even when the stream is ordered by class, which is what error bars need.

    Args:
        batches: feature arrays [n, d] in a fixed order, n may vary; for large d many rows at a time are much
            faster.

    Returns:
        One `Sums` for each group that got an example, at most GROUPS.

    Raises:
        ValueError: the stream is empty, or a feature is not finite.
    """
    groups: dict[int, Sums] = {}
    start = 0
    for batch in batches:
        for g in range(min(GROUPS, len(batch))):
            part = sums_of(batch[g::GROUPS])
            key = (start + g) % GROUPS
            groups[key] = merge(groups[key], part) if key in groups else part
        start += len(batch)
    if not groups:
        raise ValueError("there are no images to take statistics of")
    return tuple(groups[key] for key in sorted(groups))


def total(parts: Iterable[Sums]) -> Sums:
    """Sums of the union of disjoint sets, at least one."""
    return functools.reduce(merge, parts)


def write_stats(path: str | os.PathLike, stats: Stats, provenance: dict) -> None:
    """Writes statistics as an npz with `mu, sigma` (the format of EDM and pytorch-fid), `n` and `provenance`.

    Args:
        path: the file, replaced atomically; its folder is made.
        stats: with a known n.
        provenance: JSON-able; what was measured with what. Readers of `mu, sigma` ignore it.
    """
    text = np.array(json.dumps(provenance, sort_keys=True))
    write_npz(Path(path), {"mu": stats.mean, "sigma": stats.cov, "n": np.int64(stats.n), "provenance": text})


def read_stats(path: str | os.PathLike, *, spatial: bool = False) -> tuple[Stats, dict | None]:
    """Reads statistics written here, by EDM, by pytorch-fid or by any other code that stores `mu, sigma`.

    Args:
        path: an npz file.
        spatial: read `mu_s, sigma_s` where the file has them: guided-diffusion's references hold those of sFID, too.

    Returns:
        The statistics (n is None where the file does not say) and their provenance (None where the file has
        none).

    Raises:
        ValueError: the file is not such an npz, or its arrays cannot be a mean and a covariance.
    """
    arrays = read_npz(Path(path), ("mu", "sigma", "mu_s", "sigma_s", "n", "provenance"))
    if spatial and {"mu_s", "sigma_s"} <= set(arrays):
        arrays |= {"mu": arrays["mu_s"], "sigma": arrays["sigma_s"]}
    if not {"mu", "sigma"} <= set(arrays):
        raise ValueError(f"{path} holds no `mu` and `sigma` arrays; statistics are an npz with both")
    mean, cov = arrays["mu"], arrays["sigma"]
    if (
        mean.ndim != 1
        or not mean.size
        or cov.shape != (mean.size, mean.size)
        or {mean.dtype.kind, cov.dtype.kind} != {"f"}
    ):
        raise ValueError(
            f"{path}: mu {mean.dtype}{list(mean.shape)} and sigma {cov.dtype}{list(cov.shape)} are not "
            "a mean [d] and a covariance [d, d] of floats, d >= 1"
        )
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not np.isfinite(mean).all() or not np.isfinite(cov).all():
        raise ValueError(f"{path}: mu or sigma is not finite")
    if np.abs(cov - cov.T).max() > 1e-5 * np.abs(cov).max() or np.diag(cov).min() < 0:
        raise ValueError(f"{path}: sigma is not a covariance: expected a symmetric matrix without negative variances")
    return Stats(_count(arrays.get("n"), path), mean, (cov + cov.T) / 2), _provenance(arrays.get("provenance"), path)


def _count(n: np.ndarray | None, path: str | os.PathLike) -> int | None:
    if n is None:
        return None
    if n.shape or n.dtype.kind not in "iu" or n < 2:
        raise ValueError(f"{path}: n is not a number of images, expected an integer >= 2")
    return int(n)


def _provenance(text: np.ndarray | None, path: str | os.PathLike) -> dict | None:
    if text is None:
        return None
    try:
        provenance = json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: provenance is not JSON: {error}") from error
    if not isinstance(provenance, dict):
        raise ValueError(f"{path}: provenance is not a JSON object")
    return provenance
