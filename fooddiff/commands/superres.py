"""Models for super-resolution, scored against bicubic interpolation."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fooddiff import build, parallel, processes
from fooddiff.commands import scorer
from fooddiff.commands.companions import load_upsampler
from fooddiff.commands.pairs import score_pairs
from fooddiff.eval.generated import ids_like
from fooddiff.eval.images import ImageSet
from fooddiff.eval.reconstruction import check_size
from fooddiff.files.hashes import sha256_of_json
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.load import check_classes
from fooddiff.sample.enlarge import bicubic, of_real, rows_of
from fooddiff.sample.generate import draw_batches, sample_ids
from fooddiff.settings import ConfigError
from fooddiff.xla import jit

log = logging.getLogger(__name__)


def run(
    workdir: Path,
    measures: scorer.Measures,
    *,
    step: int | None,
    weights: str,
    sampling: Mapping[str, Any],
    data_path: str | None,
    per_class: int | None,
    batch_size: int,
    stop_if_asked: Callable[[], None],
) -> list[dict]:
    """Enlarges small versions of test images, and scores the result and that of bicubic interpolation in the same way.

    Both are compared with the test images they come from. The model gets the noise on its condition that its config
    has for sampling; bicubic interpolation gets none.

    Args:
        workdir: a run for super-resolution, or a file of its weights.
        measures: what, besides PSNR and SSIM.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        sampling: fields of `SamplerSpec` that replace those of config.sample where they are not None.
        data_path: where the run's data are, if not where its config says.
        per_class: how many images of each class, the first ones; None takes all.
        batch_size: images per call of the compiled sampler, rounded up to the number of devices.
        stop_if_asked: called after every batch; ends the command by what it raises. Nothing is kept then.

    Returns:
        The records of the model and of bicubic interpolation, which lie in `eval/` of `workdir.outputs`.

    Raises:
        FileNotFoundError: no such workdir, file or checkpoint.
        ValueError: it holds no model for super-resolution, the data have other classes, or a class has fewer images.
    """
    mesh = parallel.make_mesh()
    trained = load_upsampler(workdir, step=step, weights=weights, mesh=mesh)
    log.info("step %d, weights %s", trained.step, trained.weights)
    spec = build.sampler_spec(trained.config.sample, **sampling)
    enlarge = build.make_sampler(trained.model, mesh, spec)
    split = scorer.reference_of(trained.config, data_path=data_path)
    check_classes(trained, split.class_names, "the data")
    check_size(*split.pixels.shape[1:3])
    ids = _ids(split, per_class)
    originals = _images(split, ids)
    size = trained.model.low_res.size
    batch_size = parallel.divisible(batch_size, mesh)

    batches = []
    draw = of_real(enlarge, split.pixels, split.labels)
    with tqdm(total=len(ids), unit="image", dynamic_ncols=True, disable=not processes.is_first()) as progress:
        for batch in draw_batches(draw, trained.params, jax.random.key(measures.seed), ids, batch_size):
            batches.append(batch)
            progress.update(len(batch))
            stop_if_asked()
    score = partial(
        score_pairs, measures, originals=originals, kind="enlarged images", folder=workdirs.outputs(workdir) / "eval"
    )
    made_by = {
        "step": trained.step,
        "weights": trained.weights,
        "weights_sha256": processes.sha256_of(trained.params),
        "recipe": build.recipe(trained.config),
        "sampling": spec.to_json(),
        "seed": measures.seed,
        "batch_size": batch_size,
    }
    by_model = score(
        made=np.concatenate(batches),
        name=f"{size} pixels enlarged, step {trained.step:,} {trained.weights}",
        made_by=made_by,
        stem=f"superres_step_{trained.step:07d}_{trained.weights}_{spec.name}_seed{measures.seed}",
    )
    enlarged = parallel.in_batches(jit(partial(bicubic, size=size)), originals.pixels, batch_size=batch_size)
    by_rule = score(
        made=np.concatenate(list(enlarged)),
        name=f"{size} pixels enlarged, bicubic",
        made_by={"rule": "bicubic", "size": size},
        stem=f"superres_bicubic_{size}",
    )
    return [by_model, by_rule]


def _ids(split: ImageSet, per_class: int | None) -> np.ndarray:
    """(class, index) of the images to enlarge."""
    if per_class is None:
        return ids_like(split.labels)
    fewest = np.bincount(split.labels, minlength=len(split.class_names)).min()
    if not 1 <= per_class <= fewest:
        raise ConfigError(f"--per_class is {per_class}, expected 1 to {fewest}, as many as every class has")
    return sample_ids(range(len(split.class_names)), per_class)


def _images(split: ImageSet, ids: np.ndarray) -> ImageSet:
    """Those images, as a set."""
    rows = rows_of(split.labels, ids)
    identity = {
        "kind": "rows",
        "of": split.identity,
        "sha256": sha256_of_json([split.identity["sha256"], ids.tolist()]),
    }
    return ImageSet(split.name, identity, np.asarray(split.pixels)[rows], split.labels[rows], split.class_names)
