"""Scores a run's checkpoints: once, while a training goes on in another process, or inside the training itself."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fooddiff import build, parallel, processes
from fooddiff.arrays import Params
from fooddiff.eval import results
from fooddiff.eval.evaluate import Extractor, evaluate, make_extractor
from fooddiff.eval.generated import GeneratedImages, generated_set, ids_like, params_sha256
from fooddiff.eval.images import ImageSet
from fooddiff.eval.weights import load_inception
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.checkpoint import DamagedError
from fooddiff.runs.load import load_trained
from fooddiff.runs.record import NoRecorder, Recorder
from fooddiff.sample.generate import Draw, sample_ids
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import check_positive, choose

log = logging.getLogger(__name__)

SEED = 0  # of the samples that are scored during training


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How samples are drawn and scored, apart from whose they are.

    Attributes:
        extractor: features.
        metrics: of `fooddiff.eval.evaluate.METRICS`.
        kid_subsets: subsets of the kernel distance's second figure.
        kid_subset_size: their size.
        per_class: samples of every class; None takes as many of each class as the reference has.
        sampling: fields of `SamplerSpec` that replace those of config.sample where they are not None.
        seed: of the samples, and of the draws of subsets.
        batch_size: samples per call of the compiled sampler, a multiple of the number of devices.
    """

    extractor: Extractor
    metrics: Sequence[str]
    kid_subsets: int
    kid_subset_size: int
    per_class: int | None
    sampling: Mapping[str, Any]
    seed: int
    batch_size: int

    def ids(self, reference: ImageSet | Path, class_names: Sequence[str]) -> np.ndarray:
        """The samples to draw, int32[n, 2].

        Raises:
            ValueError: the number per class is not given and the reference does not tell it.
        """
        if self.per_class is not None:
            check_positive("eval.per_class", self.per_class)
            return sample_ids(range(len(class_names)), self.per_class)
        if isinstance(reference, Path) or reference.labels is None:
            raise ValueError(
                "the reference has no labels, so say with --per_class how many samples of each class to draw"
            )
        return ids_like(reference.labels)


def score(
    scoring: Scoring,
    spec: SamplerSpec,
    draw: Draw,
    params: Params,
    *,
    step: int,
    weights: str,
    class_names: Sequence[str],
    reference: ImageSet | Path,
    workdir: Path,
) -> dict:
    """Draws class-balanced samples of some weights, scores them and writes the record.

    Args:
        scoring: how.
        spec: how samples are drawn.
        draw: the compiled sampler of `spec`.
        params: the weights.
        step: the training step they are from.
        weights: their name, "raw" or "ema_<rate>".
        class_names: of the model.
        reference: images or statistics to compare with.
        workdir: the run's directory; receives eval/<name>.json.

    Returns:
        The record.
    """
    ids = scoring.ids(reference, class_names)
    made_by = {
        "step": step,
        "weights": weights,
        "weights_sha256": params_sha256(params),
        "sampling": spec.to_json(),
        "seed": scoring.seed,
        "batch_size": scoring.batch_size,
    }
    images = GeneratedImages(draw, params, jax.random.key(scoring.seed), ids, scoring.batch_size)
    samples = generated_set(images, ids, tuple(class_names), f"step {step:,} {weights}", made_by)
    record = evaluate(
        samples,
        reference,
        scoring.extractor,
        metrics=tuple(scoring.metrics),
        kid_subsets=scoring.kid_subsets,
        kid_subset_size=scoring.kid_subset_size,
        seed=scoring.seed,
        made_by=made_by,
        versions=workdirs.versions(),
    )
    path = record_path(workdir, scoring, spec, step, weights, len(ids))
    processes.on_first(lambda: results.write_record(path, record))
    return record


def numbers_of(record: dict) -> dict[str, float]:
    """The numbers of a record under names for metrics.jsonl and TensorBoard."""
    samples = record["samples"]
    prefix, n = f"eval/{samples['made_by']['weights']}", samples["n"]
    return {f"{prefix}/{result['metric']}, n={n}": result["value"] for result in record["results"]}


def record_path(workdir: Path, scoring: Scoring, spec: SamplerSpec, step: int, weights: str, n: int) -> Path:
    """Where the record of one evaluation lies: its name tells what was scored and how."""
    extractor = scoring.extractor
    how = f"{'-'.join(extractor.names)}_{extractor.resize}_{extractor.weights.sha256[:8]}"
    return workdir / "eval" / f"step_{step:07d}_{weights}_{spec.name}_seed{scoring.seed}_n{n}_{how}.json"


def scoring_during_training(config, *, after_chunk: Callable[[], None]) -> Scoring:
    """Builds the scoring that config.eval and config.sample describe; for `after_chunk` see `Extractor`."""
    settings, sample = config.eval, config.sample
    names = tuple(settings.features)
    weights = load_inception(settings.inception, names, cache_dir=settings.cache_dir)
    extractor = make_extractor(
        weights,
        names,
        resize=choose("eval.resize", settings.resize, build.RESIZE),
        batch_size=sample.batch_size,
        cache_dir=Path(settings.cache_dir),
        after_chunk=after_chunk,
    )
    return Scoring(
        extractor=extractor,
        metrics=("fd",),
        kid_subsets=100,
        kid_subset_size=1000,
        per_class=settings.per_class,
        sampling={},
        seed=SEED,
        batch_size=sample.batch_size,
    )


def run(workdir: Path, scoring: Scoring, *, step: int | None, weights: str, reference: ImageSet | Path | None) -> dict:
    """Scores one checkpoint and prints the table.

    Args:
        workdir: a run's directory.
        scoring: how.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema" or "ema_<rate>".
        reference: what to compare with; None takes the test split of the data the run was trained on.

    Returns:
        The record.
    """
    mesh = parallel.make_mesh()
    trained = load_trained(workdir, step=step, weights=weights, mesh=mesh)
    log.info("step %d, weights %s", trained.step, trained.weights)
    spec = build.sampler_spec(trained.config.sample, **scoring.sampling)
    draw = build.make_sampler(trained.model, mesh, spec)
    record = score(
        scoring,
        spec,
        draw,
        trained.params,
        step=trained.step,
        weights=trained.weights,
        class_names=trained.class_names,
        reference=reference_of(trained.config) if reference is None else reference,
        workdir=workdir,
    )
    with Recorder(workdir, resume_step=None) if processes.is_first() else NoRecorder() as recorder:
        recorder.scalars(trained.step, numbers_of(record))
    print_record(record)
    return record


def follow(
    workdir: Path,
    scoring: Scoring,
    *,
    weights: str,
    reference: ImageSet | Path | None,
    poll_seconds: float,
    stop_if_asked: Callable[[], None],
) -> None:
    """Scores every checkpoint of a running training as it appears, until the one of its last step is scored.

    Checkpoints that were scored in the same way before are left out, so that an interrupted `follow` goes on.

    Args:
        workdir: a run's directory; waits for it to appear.
        scoring: how.
        weights: "raw", "ema" or "ema_<rate>".
        reference: what to compare with; None takes the test split of the run's data.
        poll_seconds: how long to wait between two looks, in seconds.
        stop_if_asked: called while waiting; ends the command by what it raises.
    """
    log.info("waiting for checkpoints in %s", workdir)
    while True:
        steps = workdirs.checkpoint_steps(workdir)
        unscored = [step for step in steps if not already_scored(workdir, scoring, step, weights)]
        if (step := processes.first_says(min(unscored, default=-1))) >= 0:
            try:
                run(workdir, scoring, step=step, weights=weights, reference=reference)
            except (FileNotFoundError, DamagedError):
                if step in workdirs.checkpoint_steps(workdir):
                    raise
                log.warning(
                    "the training deleted the checkpoint of step %d before it was scored: raise "
                    "config.train.keep_checkpoints to keep more of them",
                    step,
                )
            continue
        if processes.first_says(bool(steps) and steps[-1] >= _last_step(workdir)):
            return
        for _ in range(math.ceil(poll_seconds)):
            stop_if_asked()
            time.sleep(min(1.0, poll_seconds))


def _last_step(workdir: Path) -> int:
    return workdirs.read_config(workdir / "config.json")["train"]["steps"]


def already_scored(workdir: Path, scoring: Scoring, step: int, weights: str) -> bool:
    """Whether a record of this step, these weights and this way of scoring exists, for any number of samples."""
    settings = workdirs.read_config(workdir / "config.json")["sample"]
    spec = build.sampler_spec(settings, **scoring.sampling)
    path = record_path(workdir, scoring, spec, step, weights if weights != "ema" else "ema_*", 0)
    pattern = path.name.replace("_n0_", "_n*_")
    return any((workdir / "eval").glob(pattern))


def reference_of(config) -> ImageSet:
    """The test split of the data that a config trains on, at the model's resolution."""
    data = build.make_dataset(config, "test")
    identity = {
        "kind": "source",
        "spec": f"{config.data.source}:{config.data.path or ''}:test",
        "size": config.data.image_size,
        "sha256": data.manifest["sha256"],
    }
    return ImageSet(f"{config.data.source} test", identity, data.images, np.asarray(data.labels), data.class_names)


def print_record(record: dict) -> None:
    """Prints the table of a record, and its warnings to stderr, once for all processes."""
    if not processes.is_first():
        return
    results.print_table(record, Console(width=max(Console().width, 160)))  # a row that is folded cannot be pasted
    for result in record["results"]:
        for warning in result["warnings"]:
            log.warning("warning: %s", warning)
