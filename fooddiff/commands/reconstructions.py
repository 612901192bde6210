"""Scores an autoencoder: what it makes of images, against these images and their statistics."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fooddiff import build, parallel, processes
from fooddiff.arrays import Params, Pixels
from fooddiff.commands import scorer
from fooddiff.commands.pairs import score_pairs
from fooddiff.eval.images import ImageSet
from fooddiff.eval.reconstruction import check_size
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.load import load_trained

log = logging.getLogger(__name__)

Reconstruct = Callable[[Params, Pixels], Pixels]


def run(
    workdir: Path,
    measures: scorer.Measures,
    *,
    step: int | None,
    weights: str,
    reference: ImageSet | None,
    batch_size: int,
) -> dict:
    """Reconstructs a set of images, scores the result, writes the record and prints its table.

    Args:
        workdir: an autoencoder's run, or a file of its weights.
        measures: what, besides PSNR and SSIM.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema" or "ema_<rate>".
        reference: the images; None takes the test split of the data that the autoencoder was trained on.
        batch_size: images per call of the compiled network, rounded up to the number of devices.

    Returns:
        The record, which lies in `eval/` of `workdir.outputs`.

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
    made_by = {
        "autoencoder": {
            "step": trained.step,
            "weights": trained.weights,
            "weights_sha256": processes.sha256_of(trained.params),
            "recipe": build.recipe(trained.config),
        },
    }
    made = parallel.in_batches(reconstruct, real, batch_size=parallel.divisible(batch_size, mesh))
    return score_pairs(
        measures,
        np.concatenate(list(made)),
        images,
        kind="reconstructions",
        name=f"reconstructions, step {trained.step:,} {trained.weights}",
        made_by=made_by,
        folder=workdirs.outputs(workdir) / "eval",
        stem=f"reconstructions_step_{trained.step:07d}_{trained.weights}",
    )
