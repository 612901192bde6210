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
from ml_collections import ConfigDict
from rich.console import Console

from fooddiff import build, parallel, processes
from fooddiff.arrays import Params
from fooddiff.commands.companions import drawing, load_companions
from fooddiff.eval import results
from fooddiff.eval.evaluate import Extractor, check_metrics, evaluate, make_extractor
from fooddiff.eval.generated import GeneratedImages, generated_set, ids_like
from fooddiff.eval.images import ImageSet
from fooddiff.eval.weights import load_inception
from fooddiff.files.hashes import sha256_of, sha256_of_json
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.checkpoint import Checkpoints, DamagedError
from fooddiff.runs.load import TrainedModel, check_task, load_trained, stored_weights
from fooddiff.runs.record import NoRecorder, Recorder
from fooddiff.sample.generate import Draw, sample_ids
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import check_positive, choose

log = logging.getLogger(__name__)

SEED = 0  # of the samples that are scored during training


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured between images and a reference.

    Attributes:
        extractor: features.
        metrics: of `fooddiff.eval.evaluate.METRICS`.
        kid_subsets: subsets of the kernel distance's second figure.
        kid_subset_size: their size.
        seed: of the draws of those subsets and, where samples are drawn, of these.
    """

    extractor: Extractor
    metrics: Sequence[str]
    kid_subsets: int
    kid_subset_size: int
    seed: int

    def evaluate(self, samples: ImageSet, reference: ImageSet | Path, made_by: Mapping[str, Any]) -> dict:
        """The record of `fooddiff.eval.evaluate.evaluate`."""
        return evaluate(
            samples,
            reference,
            self.extractor,
            metrics=self.metrics,
            kid_subsets=self.kid_subsets,
            kid_subset_size=self.kid_subset_size,
            seed=self.seed,
            made_by=made_by,
            versions=workdirs.versions(),
        )


@dataclass(frozen=True, kw_only=True)
class Scoring(Measures):
    """How samples are drawn and scored, apart from whose they are.

    Attributes:
        per_class: samples of every class; None takes as many of each class as the reference has.
        sampling: fields of `SamplerSpec` that replace those of config.sample where they are not None.
        batch_size: samples per call of the compiled sampler, a multiple of the number of devices.
    """

    per_class: int | None
    sampling: Mapping[str, Any]
    batch_size: int

    def ids(self, reference: ImageSet | Path, class_names: Sequence[str]) -> np.ndarray:
        """The samples to draw, int32[n, 2].

        Raises:
            ValueError: the number per class is not given and the reference does not tell it for the model's classes.
        """
        if self.per_class is not None:
            check_positive("eval.per_class", self.per_class)
            return sample_ids(range(len(class_names)), self.per_class)
        if isinstance(reference, Path) or reference.labels is None:
            raise ValueError(
                "the reference has no labels, so say with --per_class how many samples of each class to draw"
            )
        if not 0 <= reference.labels.min() <= reference.labels.max() < len(class_names):
            raise ValueError(
                f"the reference has the classes {reference.labels.min()} to {reference.labels.max()}, the model "
                f"{len(class_names)} classes, so say with --per_class how many samples of each to draw"
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
    recipe: Mapping[str, Any],
    reference: ImageSet | Path,
    workdir: Path,
) -> dict:
    """Draws class-balanced samples of some weights, scores them and writes the record.

    Args:
        scoring: how.
        spec: how samples are drawn.
        draw: the compiled sampler of `spec`.
        params: what `draw` takes: the weights, with those of companions if there are any.
        step: the training step they are from.
        weights: their name, "raw", "ema_<rate>" or "power_<length>".
        class_names: of the model.
        recipe: of the model, see `build.recipe`, and of its companions.
        reference: images or statistics to compare with.
        workdir: the run's directory; receives eval/<name>.json.

    Returns:
        The record.
    """
    ids = scoring.ids(reference, class_names)
    samples, made_by = samples_of(
        draw, params, ids, spec=spec, recipe=recipe, step=step, weights=weights, class_names=class_names,
        seed=scoring.seed, batch_size=scoring.batch_size,
    )  # fmt: skip
    path = record_path(workdir, scoring, spec, recipe, reference, step, weights, ids)
    return score_samples(scoring, samples, made_by, reference, path)


def score_samples(
    scoring: Scoring, samples: ImageSet, made_by: Mapping[str, Any], reference: ImageSet | Path, path: Path
) -> dict:
    """Scores what `samples_of` gives, writes the record and returns it."""
    record = scoring.evaluate(samples, reference, made_by)
    record["samples"]["seconds_per_image"] = samples.pixels.seconds_per_image()
    processes.on_first(lambda: results.write_record(path, record))
    return record


def samples_of(
    draw: Draw,
    params: Params,
    ids: np.ndarray,
    *,
    spec: SamplerSpec,
    recipe: Mapping[str, Any],
    step: int,
    weights: str,
    class_names: Sequence[str],
    seed: int,
    batch_size: int,
    keep: bool = False,
) -> tuple[ImageSet, dict[str, Any]]:
    """Names samples of a model, which are drawn when they are asked for; for `keep` see `GeneratedImages`.

    Returns:
        The samples `ids`, int32[n, 2], and everything they depend on besides, as JSON types.
    """
    made_by = {
        "step": step,
        "weights": weights,
        "weights_sha256": processes.sha256_of(params),
        "recipe": recipe,
        "sampling": spec.to_json(),
        "seed": seed,
        "batch_size": batch_size,
    }
    images = GeneratedImages(draw, params, jax.random.key(seed), ids, batch_size, keep=keep)
    return generated_set(images, ids, tuple(class_names), f"step {step:,} {weights}", made_by), made_by


def numbers_of(record: dict, how: str = "") -> dict[str, float]:
    """The numbers of a record under names for metrics.jsonl and TensorBoard, which end in how samples were drawn."""
    prefix = f"eval/{record['samples']['made_by']['weights']}"
    return {f"{prefix}/{result['metric']}, n={result['n']}{how}": result["value"] for result in record["results"]}


def how_drawn(
    spec: SamplerSpec,
    trained: TrainedModel,
    recipe: Mapping[str, Any],
    reference: str | None,
    *,
    seed: int,
    resize: str | None = None,
) -> str:
    """The end of a number's name that keeps it apart from those of a training, "" where it is one of these.

    Args:
        spec: how samples were drawn.
        trained: of what.
        recipe: of all models that took part.
        reference: the hash of what they were compared with; None for the training's own test split.
        seed: of the samples.
        resize: the name of the rule by which images were resized for features; None if none was.
    """
    config = trained.config
    usual = build.sampler_spec(config.sample), build.recipe(config), None, SEED, resize and config.eval.resize
    if (spec, recipe, reference, seed, resize) == usual:
        return ""
    return f", {spec.name}_{sha256_of_json([spec.to_json(), recipe, reference, seed, resize])[:8]}"


def record_path(
    workdir: Path,
    scoring: Scoring,
    spec: SamplerSpec,
    recipe: Mapping[str, Any],
    reference: ImageSet | Path,
    step: int,
    weights: str,
    ids: np.ndarray,
) -> Path:
    """Where the record of one evaluation lies.

    Its name tells what was scored; it ends in a hash of how, so that other ways of scoring do not take its place.
    """
    extractor = scoring.extractor
    counts = np.unique(ids[:, 0], return_counts=True)[1]
    how = {
        "recipe": recipe,
        "sampling": spec.to_json(),
        "batch_size": scoring.batch_size,
        "inception": extractor.weights.sha256,
        "features": list(extractor.names),
        "resize": extractor.resize,
        "metrics": sorted(scoring.metrics),
        "kid": [scoring.kid_subsets, scoring.kid_subset_size],
        "reference": hash_of(reference),
        **({} if (counts == counts[0]).all() else {"ids": ids.tolist()}),
    }
    what = f"step_{step:07d}_{weights}_{spec.name}_seed{scoring.seed}_n{len(ids)}"
    return workdir / "eval" / f"{what}_{sha256_of_json(how)[:8]}.json"


def check_size(reference: ImageSet | Path | None, image_size: int) -> None:
    """Raises ValueError if the images of a source were brought to another size than a model's."""
    if isinstance(reference, ImageSet) and reference.identity.get("size", image_size) != image_size:
        raise ValueError(
            f"the reference was brought to {reference.identity['size']} pixels, the samples have {image_size}: give "
            f"--image_size={image_size}"
        )


def hash_of(reference: ImageSet | Path) -> str:
    """The SHA-256 of what is compared with."""
    return sha256_of(reference) if isinstance(reference, Path) else reference.identity["sha256"]


def scoring_during_training(config, *, after_chunk: Callable[[], None]) -> Scoring:
    """Builds the scoring that config.eval and config.sample describe; for `after_chunk` see `Extractor`."""
    settings, sample = config.eval, config.sample
    names, metrics = tuple(settings.features), ("fd",)
    check_metrics(metrics, names)
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
        metrics=metrics,
        kid_subsets=100,
        kid_subset_size=1000,
        per_class=settings.per_class,
        sampling={},
        seed=SEED,
        batch_size=sample.batch_size,
    )


def run(
    workdir: Path,
    scoring: Scoring,
    *,
    step: int | None,
    weights: str,
    reference: ImageSet | Path | None,
    data_path: str | None = None,
    guide: Path | None = None,
    guide_step: int | None = None,
    classifier: Path | None = None,
    upsample: Path | None = None,
) -> dict:
    """Scores one checkpoint and prints the table.

    Args:
        workdir: a run's directory, or a file of weights.
        scoring: how.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        reference: what to compare with; None takes the test split of the data the run was trained on.
        data_path: where these are, if not where the run's config says.
        guide: the workdir or file of a model to move away from in place of the null label.
        guide_step: checkpoint of the guide; None takes the newest.
        classifier: the workdir or file of a classifier of noisy images that guides, too.
        upsample: the workdir or file of a model for super-resolution that enlarges what is drawn.

    Returns:
        The record.
    """
    mesh = parallel.make_mesh()
    trained = load_trained(workdir, step=step, weights=weights, mesh=mesh)
    log.info("step %d, weights %s", trained.step, trained.weights)
    spec = build.sampler_spec(trained.config.sample, **scoring.sampling)
    companions = load_companions(
        trained, mesh, guide=guide, guide_step=guide_step, classifier=classifier, upsample=upsample
    )
    draw, params, recipe, image_size = drawing(trained, mesh, spec, companions)
    check_size(reference, image_size)
    outputs = workdirs.outputs(workdir)
    compared = None if reference is None else hash_of(reference)
    how = how_drawn(spec, trained, recipe, compared, seed=scoring.seed, resize=scoring.extractor.resize)
    record = score(
        scoring,
        spec,
        draw,
        params,
        step=trained.step,
        weights=trained.weights,
        class_names=trained.class_names,
        recipe=recipe,
        reference=reference_of(trained.config, image_size, data_path=data_path) if reference is None else reference,
        workdir=outputs,
    )
    with Recorder(outputs, resume_step=None) if processes.is_first() else NoRecorder() as recorder:
        recorder.scalars(trained.step, numbers_of(record, how))
    print_record(record)
    return record


def follow(
    workdir: Path,
    scoring: Scoring,
    *,
    weights: str,
    reference: ImageSet | Path | None,
    data_path: str | None,
    poll_seconds: float,
    stop_if_asked: Callable[[], None],
) -> None:
    """Scores every checkpoint of a running training as it appears, until the one of its last step is scored.

    Checkpoints that were scored in the same way before are left out, so that an interrupted `follow` goes on.

    Args:
        workdir: a run's directory; waits for it to appear.
        scoring: how.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        reference: what to compare with; None takes the test split of the run's data.
        data_path: where these are, if not where the run's config says.
        poll_seconds: how long to wait between two looks, in seconds.
        stop_if_asked: called while waiting; ends the command by what it raises.

    Raises:
        ValueError: a file in place of a workdir, or a time that cannot be waited.
    """
    if workdir.is_file():
        raise ValueError(f"{workdir} is a file of weights, to which nothing is added: score it with `run`")
    if not 0 < poll_seconds < math.inf:
        raise ValueError(f"--poll_seconds is {poll_seconds}, expected a number above 0")
    log.info("waiting for checkpoints in %s", workdir)
    images, ids, done = reference, None, set()
    while True:
        steps = workdirs.checkpoint_steps(workdir)
        if steps and ids is None:
            images = reference_of(_config(workdir), data_path=data_path) if reference is None else reference
            with Checkpoints(workdir, read_only=True) as checkpoints:
                ids = scoring.ids(images, checkpoints.meta(steps[-1])["class_names"])
        new = set(steps) - done
        done |= {step for step in new if already_scored(workdir, scoring, images, step, weights, ids)}
        if (step := processes.first_says(min(set(steps) - done, default=-1))) >= 0:
            done.add(step)
            try:
                run(workdir, scoring, step=step, weights=weights, reference=reference, data_path=data_path)
            except (FileNotFoundError, DamagedError):
                if step in workdirs.checkpoint_steps(workdir):
                    raise
                log.warning(
                    "the training deleted the checkpoint of step %d before it was scored: raise "
                    "config.train.keep_checkpoints to keep more of them",
                    step,
                )
            continue
        if processes.first_says(bool(steps) and steps[-1] >= _config(workdir).train.steps):
            return
        for _ in range(math.ceil(poll_seconds)):
            stop_if_asked()
            time.sleep(min(1.0, poll_seconds))


def _config(workdir: Path) -> ConfigDict:
    config = ConfigDict(workdirs.read_config(workdir / "config.json"))
    check_task(config, "diffusion", workdir)
    return config


def already_scored(
    workdir: Path, scoring: Scoring, reference: ImageSet | Path, step: int, weights: str, ids: np.ndarray
) -> bool:
    """Whether a record of these samples of this step, these weights and this way of scoring exists.

    A restart may have changed config.sample: what holds is the config of the checkpoint.
    """
    try:
        with Checkpoints(workdir, read_only=True) as checkpoints:
            config = ConfigDict(checkpoints.meta(step)["config"])
    except DamagedError:
        return False  # or deleted: scoring it says what is wrong
    spec = build.sampler_spec(config.sample, **scoring.sampling)
    name, _ = stored_weights(weights, config.ema)
    return record_path(workdir, scoring, spec, build.recipe(config), reference, step, name, ids).exists()


def reference_of(config, image_size: int | None = None, *, data_path: str | None = None) -> ImageSet:
    """The test split of the data that a config trains on.

    Args:
        config: of a run.
        image_size: in pixels; None takes the model's.
        data_path: where the data are now; None takes config.data.path, which exported files do not have.
    """
    config = config.copy_and_resolve_references()
    config.data.update({"path": data_path or config.data.path, "image_size": image_size or config.data.image_size})
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
