"""Scores an autoencoder: what it makes of images, against these images and their statistics."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from fooddiff import build, parallel, processes
from fooddiff.arrays import Array, Float, Params, Pixels
from fooddiff.commands import scorer
from fooddiff.eval import results
from fooddiff.eval.evaluate import Extractor, evaluate
from fooddiff.eval.images import ImageSet
from fooddiff.eval.reconstruction import check_size, psnr, ssim
from fooddiff.files.hashes import sha256_of_json
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.load import load_trained

log = logging.getLogger(__name__)

Reconstruct = Callable[[Params, Pixels], Pixels]


def run(
    workdir: Path,
    extractor: Extractor,
    *,
    step: int | None,
    weights: str,
    reference: ImageSet | None,
    metrics: Sequence[str],
    kid_subsets: int,
    kid_subset_size: int,
    seed: int,
    batch_size: int,
) -> dict:
    """Reconstructs a set of images, scores the result, writes the record and prints its table.

    Args:
        workdir: an autoencoder's run, or a file of its weights.
        extractor: features.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema" or "ema_<rate>".
        reference: the images; None takes the test split of the data that the autoencoder was trained on.
        metrics: of `fooddiff.eval.evaluate.METRICS`, besides PSNR and SSIM.
        kid_subsets: subsets of the kernel distance's second figure.
        kid_subset_size: their size.
        seed: of the draws of those subsets.
        batch_size: images per call of the compiled network, rounded up to the number of devices.

    Returns:
        The record, which lies in `eval/` of the workdir, or beside the file.

    Raises:
        FileNotFoundError: no such workdir, file or checkpoint.
        ValueError: it holds no autoencoder, or one that cannot take images of this size.
    """
    mesh = parallel.make_mesh()
    trained = load_trained(workdir, step=step, weights=weights, mesh=mesh, task="autoencoder")
    log.info("step %d, weights %s", trained.step, trained.weights)
    images = scorer.reference_of(trained.config) if reference is None else reference
    real = images.pixels[slice(0, len(images.pixels))]
    check_size(*real.shape[1:3])
    reconstruct = partial(build.make_reconstruct(trained.model, mesh), trained.params)
    ours = in_batches(reconstruct, real, batch_size + -batch_size % mesh.size)
    made_by = {
        "autoencoder": {
            "step": trained.step,
            "weights": trained.weights,
            "weights_sha256": processes.sha256_of(trained.params),
            "recipe": build.recipe(trained.config),
        },
        "of": images.identity["sha256"],
    }
    identity = {"kind": "reconstructions", "sha256": sha256_of_json(made_by)}
    name = f"reconstructions, step {trained.step:,} {trained.weights}"
    record = evaluate(
        ImageSet(name, identity, ours, images.labels, images.class_names),
        images,
        extractor,
        metrics=tuple(metrics),
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        seed=seed,
        made_by=made_by,
        versions=workdirs.versions(),
    )
    record["results"] += [asdict(_mean("PSNR [dB]", psnr(real, ours))), asdict(_mean("SSIM", ssim(real, ours)))]
    how = sha256_of_json([identity, extractor.weights.sha256, extractor.resize, *extractor.names, *sorted(metrics)])
    name = f"reconstructions_step_{trained.step:07d}_{trained.weights}_n{len(real)}_{how[:8]}.json"
    path = (workdir if workdir.is_dir() else workdir.parent) / "eval" / name
    processes.on_first(lambda: results.write_record(path, record))
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
