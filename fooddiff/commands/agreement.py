"""Class agreement of a trained model: a classifier that was trained on real images alone reads its samples."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fooddiff import build, parallel, processes
from fooddiff.commands import scorer
from fooddiff.commands.companions import Companions, check_fits, drawing, load_companions
from fooddiff.eval.agreement import Readings, accuracies, distance, make_read, read_images
from fooddiff.eval.generated import ids_like
from fooddiff.eval.images import ImageSet
from fooddiff.eval.results import with_error, write_record
from fooddiff.files.hashes import sha256_of_json
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.load import TrainedModel, check_classes, load_trained
from fooddiff.runs.record import NoRecorder, Recorder
from fooddiff.runs.workdir import WorkdirError
from fooddiff.sample.generate import sample_ids
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import check_counts

log = logging.getLogger(__name__)


class Judge(NamedTuple):
    """A classifier of real images that reads samples."""

    path: Path
    sha256: str  # of its weights
    made_by: Mapping[str, Any]  # how its weights came to be
    read: Callable[[ImageSet], Readings]  # see `read_images`


def load_judge(
    path: Path,
    trained: TrainedModel,
    mesh: jax.sharding.Mesh,
    *,
    image_size: int,
    batch_size: int,
    cache_dir: Path,
    stop_if_asked: Callable[[], None],
) -> Judge:
    """Loads the averaged weights of a classifier.

    Args:
        path: its workdir or file.
        trained: the model whose samples it is to read.
        mesh: devices.
        image_size: of these samples, in pixels.
        batch_size: images per call, a multiple of the number of devices.
        cache_dir: where what was classified is kept.
        stop_if_asked: called after every chunk; ends the command by what it raises.

    Raises:
        ValueError: a model without classes, or a judge of other classes or another image size.
    """
    if trained.model.num_classes is None:
        raise WorkdirError("the model knows no classes, so there is nothing to agree with")
    judging = load_trained(path, step=None, weights="ema", mesh=mesh, task="classifier")
    check_fits(judging, trained, path, image_size=image_size)
    sha = processes.sha256_of(judging.params)
    read = partial(
        read_images,
        make_read(partial(build.read_clean, judging.model), judging.model.codec, mesh),
        judging.params,
        batch_size=batch_size,
        judge=sha,
        cache_dir=cache_dir,
        after_chunk=stop_if_asked,
    )
    made_by = {"step": judging.step, "weights": judging.weights, "recipe": build.recipe(judging.config)}
    return Judge(path, sha, made_by, read)


def run(
    workdir: Path,
    judge: Path,
    *,
    step: int | None,
    weights: str,
    sampling: Mapping[str, Any],
    guide: Path | None,
    guide_step: int | None,
    classifier: Path | None,
    upsample: Path | None,
    data_path: str | None,
    per_class: int | None,
    seed: int,
    batch_size: int,
    cache_dir: Path,
    stop_if_asked: Callable[[], None],
) -> dict:
    """Writes how many samples the judge reads as the class they were drawn for, beside its accuracy on real images.

    Args:
        workdir: a run's directory; receives eval/agreement_....json.
        judge: the workdir, or the file, of a classifier; its averaged weights judge.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        sampling: fields of `SamplerSpec` that replace those of config.sample where they are not None.
        guide: another model, from which guidance moves away; see `load_companions`.
        guide_step: checkpoint of the guide; None takes the newest.
        classifier: another classifier, which guides.
        upsample: a model for super-resolution, which enlarges what is drawn.
        data_path: where the run's data are, if not where its config says.
        per_class: samples of every class; None takes as many of each class as the test split has.
        seed: of the samples.
        batch_size: samples per call of the compiled sampler, a multiple of the number of devices.
        cache_dir: where what was classified is kept.
        stop_if_asked: called after every chunk; ends the command by what it raises.

    Returns:
        The record.

    Raises:
        ValueError: a model without classes, or a judge of other classes or another image size.
    """
    check_counts("--", per_class=per_class, batch_size=batch_size)
    mesh = parallel.make_mesh()
    batch_size = parallel.divisible(batch_size, mesh)
    trained = load_trained(workdir, step=step, weights=weights, mesh=mesh)
    spec = build.sampler_spec(trained.config.sample, **sampling)
    companions = load_companions(
        trained, mesh, guide=guide, guide_step=guide_step, classifier=classifier, upsample=upsample
    )
    draw, params, recipe, image_size = drawing(trained, mesh, spec, companions)
    judging = load_judge(
        judge, trained, mesh, image_size=image_size, batch_size=batch_size, cache_dir=cache_dir,
        stop_if_asked=stop_if_asked,
    )  # fmt: skip
    reference = scorer.reference_of(trained.config, image_size, data_path=data_path)
    check_classes(trained, reference.class_names, "the data")
    ids = ids_like(reference.labels) if per_class is None else sample_ids(range(len(trained.class_names)), per_class)
    samples, made_by = scorer.samples_of(
        draw, params, ids, spec=spec, recipe=recipe, step=trained.step, weights=trained.weights,
        class_names=trained.class_names, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    outputs = workdirs.outputs(workdir)
    how = scorer.how_drawn(spec, trained, recipe, None, seed=seed)
    record = judge_samples(judging, samples, made_by, spec, reference, outputs, companions)
    with Recorder(outputs, resume_step=None) if processes.is_first() else NoRecorder() as recorder:
        recorder.scalars(trained.step, scorer.numbers_of(record, how))
    if processes.is_first():
        _print(record)
    return record


def judge_samples(
    judge: Judge,
    samples: ImageSet,
    made_by: Mapping[str, Any],
    spec: SamplerSpec,
    reference: ImageSet,
    workdir: Path,
    companions: Companions,
) -> dict:
    """Writes the record of what a judge reads in samples, and in real images.

    Args:
        judge: from `load_judge`.
        samples: with what they were made by, see `scorer.samples_of`.
        made_by: that.
        spec: how they were drawn.
        reference: real images with labels.
        workdir: receives eval/agreement_....json.
        companions: of the samples; a judge among them is named in the record.

    Returns:
        The record.
    """
    by_judge = companions.classifier is not None and processes.sha256_of(companions.classifier.params) == judge.sha256
    warnings = ("the judge has guided the samples itself",) * by_judge
    of_samples, of_real_images = judge.read(samples), judge.read(reference)
    record = {
        "results": [
            asdict(result)
            for result in (
                *accuracies("agreement", judge.sha256, of_samples.ranks, warnings),
                *accuracies("accuracy", judge.sha256, of_real_images.ranks),
                distance(judge.sha256, of_samples, of_real_images),
            )
        ],
        "samples": samples.describe() | {"made_by": made_by},
        "reference": reference.describe(),
        "judge": {"path": str(judge.path), "sha256": judge.sha256, **judge.made_by},
        "versions": workdirs.versions(),
    }
    how = {name: made_by[name] for name in ("recipe", "sampling", "batch_size", "weights_sha256")}
    how |= {"judge": judge.sha256, "reference": reference.identity["sha256"]}
    of = f"step_{made_by['step']:07d}_{made_by['weights']}_{spec.name}_seed{made_by['seed']}_n{len(samples.pixels)}"
    path = workdir / "eval" / f"agreement_{of}_{sha256_of_json(how)[:8]}.json"
    processes.on_first(lambda: write_record(path, record))
    if processes.is_first():
        for result in record["results"]:
            for warning in result["warnings"]:
                log.warning("warning: %s", warning)
    log.info("wrote %s", path)
    return record


def _print(record: dict) -> None:
    """Prints every share, and the distance, with its number of images and where these are from."""
    table = Table()
    for column in ("metric", "value ± 1 sd", "n", "of"):
        table.add_column(column, no_wrap=column == "metric", overflow="fold")
    for result in record["results"]:
        images = record["reference" if result["metric"].startswith("accuracy") else "samples"]["name"]
        value, error = result["value"], result["error"]
        is_distance = result["metric"].startswith("FD-")
        shown = with_error(value, error) if is_distance else f"{100 * value:.2f} ± {100 * error:.2g} %"
        table.add_row(escape(result["metric"]), shown, f"{result['n']:,}", escape(images))
    Console(width=max(Console().width, 120)).print(table)
