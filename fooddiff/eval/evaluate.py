"""From two sets of images to named numbers: features, statistics, distances, record.

Owns the order of these steps and the caches between them. Knows no command line.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from fooddiff import processes
from fooddiff.eval import inception, results
from fooddiff.eval.distances import (
    frechet_estimate,
    inception_score,
    kernel_distance,
    kernel_distance_subsets,
    precision_recall,
)
from fooddiff.eval.extract import Extract, feature_chunks, make_extract
from fooddiff.eval.images import ImageSet, images_in
from fooddiff.eval.resize import Resize
from fooddiff.eval.results import Result
from fooddiff.eval.stats import Stats, finish, grouped_sums, read_stats, sums_of, total, write_stats
from fooddiff.eval.weights import InceptionWeights, metric_name
from fooddiff.files.hashes import sha256_of, sha256_of_json

METRICS = ("fd", "kd", "pr", "is")
"""Fréchet distance, kernel distance, precision and recall, Inception Score."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """How images become features: everything but the images that a number depends on.

    Attributes:
        weights: the network's parameters and what they are.
        names: the features, keys of `inception.DIMENSIONS`.
        resize: the name of the resize rule.
        extract: the compiled function.
        cache_dir: where features and statistics are kept; safe to delete at any time.
        after_chunk: called whenever a chunk of features was stored; what it raises ends the evaluation, which a second
            one completes.
    """

    weights: InceptionWeights
    names: tuple[str, ...]
    resize: str
    extract: Extract
    cache_dir: Path
    after_chunk: Callable[[], None]


def make_extractor(
    weights: InceptionWeights,
    names: tuple[str, ...],
    *,
    resize: Resize,
    batch_size: int,
    cache_dir: Path,
    after_chunk: Callable[[], None],
) -> Extractor:
    """Binds weights, features, resize rule and batch size.

    Args:
        weights: from `load_inception` for the same features.
        names: feature names.
        resize: a rule of resize.py; its function name is the rule's name.
        batch_size: images per call of the network, a multiple of the number of devices.
        cache_dir: where features and statistics are kept.
        after_chunk: see `Extractor`.

    Returns:
        The extractor.
    """
    return Extractor(
        weights=weights,
        names=names,
        resize=resize.__name__,
        extract=make_extract(weights.params, names, resize=resize, batch_size=batch_size),
        cache_dir=cache_dir,
        after_chunk=after_chunk,
    )


def features_of(extractor: Extractor, images: ImageSet, name: str) -> Iterator[np.ndarray]:
    """Streams one feature of a set of images, computing what the cache does not hold.

    Args:
        extractor: how.
        images: of what.
        name: one of the extractor's features.

    Yields:
        f32[n, d], chunk by chunk, in the order of the images.
    """
    folder, identity = _place(extractor, images)
    with tqdm(
        total=len(images.pixels), unit="image", desc=f"features of {images.name}", leave=False,
        disable=not processes.is_first(),
    ) as bar:  # fmt: skip
        for chunk in feature_chunks(
            images.pixels, extractor.extract, identity=identity, folder=folder,
            progress=lambda done: bar.update(done - bar.n), after_chunk=extractor.after_chunk,
        ):  # fmt: skip
            yield chunk[name]


def stats_of(extractor: Extractor, images: ImageSet, name: str) -> Stats:
    """Statistics of one feature of a set of images, from the cache if they were computed before.

    Args:
        extractor: how.
        images: of what, at least two.
        name: one of the extractor's features.

    Returns:
        The statistics.
    """
    path = _place(extractor, images)[0] / f"stats-{name}.npz"
    if not processes.first_says(path.exists()):
        sums = (sums_of(chunk) for chunk in features_of(extractor, images, name))
        stats = finish(total(sums))
        processes.on_first(lambda: write_stats(path, stats, stats_provenance(extractor, images, name)))
    return read_stats(path)[0]


def stats_provenance(extractor: Extractor, images: ImageSet, name: str) -> dict:
    """What statistics of a feature were computed from and how: JSON-able."""
    return {"images": images.identity, **_how(extractor), "feature": name}


def evaluate(
    samples: ImageSet,
    reference: ImageSet | Path,
    extractor: Extractor,
    *,
    metrics: Sequence[str],
    kid_subsets: int,
    kid_subset_size: int,
    seed: int,
    made_by: dict,
    versions: dict,
) -> dict:
    """Scores a set of images.

    Args:
        samples: the scored set.
        reference: images, or an npz of statistics, which may hold the images for `kd` and `pr` as `arr_0`, too.
        extractor: how features are computed; every feature is scored: logits by `is`, all others by the distances.
        metrics: of `METRICS`.
        kid_subsets: subsets of the kernel distance's second figure.
        kid_subset_size: their size; at most the size of either set.
        seed: of the draws of those subsets.
        made_by: how the samples came to be, for the record: step, weights, sampler, steps, seed. {} for found
            images.
        versions: of the packages, for the record.

    Returns:
        A record as `results.record` makes it.

    Raises:
        ValueError: a metric does not exist, has no features, or needs images where statistics are given.
    """
    check_metrics(metrics, extractor.names)
    others = images_in(reference) if isinstance(reference, Path) else reference
    if others is None and {"kd", "pr"} & set(metrics):
        raise ValueError(
            f"{reference} holds statistics alone: only fd can be computed from them; kd and pr need images"
        )
    found: list[Result] = []
    for name in extractor.names:
        if name in inception.LOGITS:
            score = inception_score(np.concatenate(list(features_of(extractor, samples, name))))
            label = metric_name("IS", name, extractor.weights)
            found.append(results.plain_result(label, score, n=len(samples.pixels)))
            continue
        if "fd" in metrics:
            found.append(_frechet(samples, reference, extractor, name))
        if not {"kd", "pr"} & set(metrics):
            continue
        x, y = (np.concatenate(list(features_of(extractor, images, name))) for images in (samples, others))
        if "kd" in metrics:
            size = min(kid_subset_size, len(x), len(y))
            label = metric_name("KD", name, extractor.weights)
            subsets = kernel_distance_subsets(x, y, subsets=kid_subsets, size=size, seed=seed)
            found.append(results.plain_result(label, kernel_distance(x, y), n=len(x)))
            found.append(results.plain_result(f"{label}, {kid_subsets} subsets of {size:,}", subsets, n=len(x)))
        if "pr" in metrics:
            for metric, estimate in precision_recall(x, y)._asdict().items():
                label = metric_name(metric.capitalize(), name, extractor.weights)
                found.append(results.plain_result(label, estimate, n=len(x)))
    return results.record(
        found,
        weights=extractor.weights,
        resize=extractor.resize,
        samples={**_describe(samples), "made_by": made_by},
        reference=_describe(reference),
        versions=versions,
    )


def check_metrics(metrics: Sequence[str], names: Sequence[str]) -> None:
    """Raises ValueError unless every metric has a feature and every feature a metric."""
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"there is no metric {', '.join(unknown)}; choose from {', '.join(METRICS)}")
    logits = [name for name in names if name in inception.LOGITS]
    distances = [metric for metric in metrics if metric != "is"]
    if ("is" in metrics) != bool(logits):
        raise ValueError(
            f"the metric is (Inception Score) and the features {' and '.join(inception.LOGITS)} belong together: got "
            f"the metrics {', '.join(metrics)} and the features {', '.join(names)}"
        )
    if bool(distances) != (len(names) > len(logits)):
        raise ValueError(
            f"fd, kd and pr are of other features than logits, such as 2048: got the metrics {', '.join(metrics)} and "
            f"the features {', '.join(names)}"
        )


def _frechet(samples: ImageSet, reference: ImageSet | Path, extractor: Extractor, name: str) -> Result:
    warnings = []
    if isinstance(reference, Path):
        target, provenance = read_stats(reference, spatial=name == "spatial")
        if provenance is None:
            warnings.append(f"{reference} does not say with which feature, resize rule and weights it was made")
        else:
            _check_provenance(reference, provenance, {**_how(extractor), "feature": name})
    else:
        target = stats_of(extractor, reference, name)
    estimate = frechet_estimate(grouped_sums(features_of(extractor, samples, name)), target)
    label = metric_name("FD", name, extractor.weights)
    return results.frechet_result(
        label, estimate, n=len(samples.pixels), dimension=inception.DIMENSIONS[name], warnings=warnings
    )


def _check_provenance(path: Path, provenance: dict, expected: dict) -> None:
    for key, value in expected.items():
        if provenance.get(key) != value:
            raise ValueError(f"{path} was made with {key} {provenance.get(key)!r}, but here it is {value!r}")


def _describe(images: ImageSet | Path) -> dict:
    if isinstance(images, Path):
        stats, provenance = read_stats(images)
        identity = {
            "kind": "stats",
            "path": str(images),
            "sha256": sha256_of(images),
            "provenance": provenance,
        }
        return {"name": images.stem, "identity": identity, "n": stats.n, "n_per_class": None}
    return images.describe()


def _how(extractor: Extractor) -> dict:
    return {"inception": extractor.weights.sha256, "resize": extractor.resize}


def _place(extractor: Extractor, images: ImageSet) -> tuple[Path, dict]:
    """The cache folder of a set's features, and the identity whose hash is its name."""
    identity = {
        "images": images.identity["sha256"],
        "n": len(images.pixels),
        **_how(extractor),
        "features": list(extractor.names),
    }
    key = sha256_of_json(identity)[:16]
    return extractor.cache_dir / "features" / key, identity
