"""One set of weights scored under many samplers: how near the images of each are, what is seen in them, their cost."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fooddiff import build, parallel, processes
from fooddiff.commands import agreement, scorer
from fooddiff.commands.companions import Companions, drawing, load_companions
from fooddiff.eval import results
from fooddiff.eval.images import ImageSet
from fooddiff.files.atomic import write_atomically
from fooddiff.files.hashes import sha256_of_json
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.load import TrainedModel, check_classes, load_trained
from fooddiff.sample.spec import SamplerSpec

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One sampler."""

    spec: SamplerSpec
    network_calls: int  # per image
    record: Mapping[str, Any]
    path: Path  # of the record
    judged: Mapping[str, Any] | None  # the record of class agreement

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """What was measured of the samples."""
        read = [] if self.judged is None else self.judged["results"]
        return [*self.record["results"], *(result for result in read if not result["metric"].startswith("accuracy"))]


def run(
    workdir: Path,
    scoring: scorer.Scoring,
    choices: Sequence[Mapping[str, Any]],
    *,
    step: int | None,
    weights: str,
    reference: ImageSet | Path | None,
    data_path: str | None,
    guide: Path | None,
    guide_step: int | None,
    classifier: Path | None,
    upsample: Path | None,
    judge: Path | None,
) -> list[Row]:
    """Scores a checkpoint under every choice, prints one table and writes it to eval/sweep_....csv.

    Each choice leaves the records that `scorer.run` and, with a judge, `agreement.run` would leave, and its samples are
    drawn once for both. A choice that has a record of its distance, and no judge to read it, is not drawn again. The
    table has a column for every number that records hold.

    Args:
        workdir: a run's directory, or a file of weights.
        scoring: how.
        choices: fields of `SamplerSpec`; choices that come to the same spec are one.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        reference: what to compare with; None takes the test split of the data the run was trained on, which a judge
            reads, too.
        data_path: where these are, if not where the run's config says.
        guide: the workdir or file of a model to move away from in place of the null label, where there is guidance.
        guide_step: checkpoint of the guide; None takes the newest.
        classifier: the workdir or file of a classifier of noisy images that guides, too, where its scale is not 0.
        upsample: the workdir or file of a model for super-resolution that enlarges what is drawn.
        judge: the workdir or file of a classifier of real images, for class agreement.

    Returns:
        The table's rows.
    """
    mesh = parallel.make_mesh()
    trained = load_trained(workdir, step=step, weights=weights, mesh=mesh)
    companions = load_companions(
        trained, mesh, guide=guide, guide_step=guide_step, classifier=classifier, upsample=upsample
    )
    settings = dict(trained.config.sample)
    specs = [build.sampler_spec(settings | choice, **scoring.sampling) for choice in choices]
    drawings = {  # all of them now, so that a bad one is refused before the first is scored
        spec: drawing(trained, mesh, spec, _taking_part(companions, spec)) for spec in specs
    }
    (image_size,) = {drawn.image_size for drawn in drawings.values()}
    scorer.check_size(reference, image_size)
    judging = judge and agreement.load_judge(
        judge, trained, mesh, image_size=image_size, batch_size=scoring.batch_size,
        cache_dir=scoring.extractor.cache_dir, stop_if_asked=scoring.extractor.after_chunk,
    )  # fmt: skip
    real = None
    if reference is None or judging:
        real = scorer.reference_of(trained.config, image_size, data_path=data_path)
    if judging:
        check_classes(trained, real.class_names, "the data")
    reference = real if reference is None else reference
    ids = scoring.ids(reference, trained.class_names)
    outputs, rows = workdirs.outputs(workdir), []
    for i, (spec, (draw, params, recipe, _)) in enumerate(drawings.items()):
        log.info("%d of %d: %s", i + 1, len(drawings), spec.name)
        path = scorer.record_path(outputs, scoring, spec, recipe, reference, trained.step, trained.weights, ids)
        samples, made_by = scorer.samples_of(
            draw, params, ids, spec=spec, recipe=recipe, step=trained.step, weights=trained.weights,
            class_names=trained.class_names, seed=scoring.seed, batch_size=scoring.batch_size, keep=bool(judging),
        )  # fmt: skip
        record = results.read_record(path) if processes.first_says(path.exists()) else None
        made = record and sha256_of_json(record["samples"]["made_by"])
        if made != sha256_of_json(made_by):  # none, or one of weights that had this name before
            record = scorer.score_samples(scoring, samples, made_by, reference, path)
        judged = judging and agreement.judge_samples(
            judging, samples, made_by, spec, real, outputs, _taking_part(companions, spec)
        )
        rows.append(Row(spec, _network_calls(trained, spec, companions), record, path, judged))
    place = outputs / "eval" / f"sweep_step_{trained.step:07d}_{trained.weights}_{_hash(rows)}.csv"
    processes.on_first(lambda: write_atomically(place, _csv(rows).encode()))
    if processes.is_first():
        by = "" if companions.guide is None else f", guided by step {companions.guide.identity['step']} of {guide}"
        against = f"n = {len(ids)}, against {rows[0].record['reference']['name']}{by}"
        title = f"step {trained.step:,}, weights {trained.weights}, {against}"
        Console(width=max(Console().width, 160)).print(table(rows, title))
        log.info("wrote %s", place)
    return rows


def _network_calls(trained: TrainedModel, spec: SamplerSpec, companions: Companions) -> int:
    """Of all networks that take part in one image."""
    calls = build.network_calls(trained.model, spec)
    if (above := companions.upsampler) is None:
        return calls
    return calls + build.network_calls(above.model, build.sampler_spec(above.config.sample))


def _taking_part(companions: Companions, spec: SamplerSpec) -> Companions:
    """Those of the companions that a sampler asks for."""
    return companions._replace(
        guide=companions.guide if spec.guidance != 1 else None,
        classifier=companions.classifier if spec.classifier_scale else None,
    )


def table(rows: Sequence[Row], title: str) -> Table:
    """A line for each sampler, with the settings in which they differ."""
    names = [
        field.name
        for field in fields(SamplerSpec)
        if field.name in ("sampler", "steps") or len({getattr(row.spec, field.name) for row in rows}) > 1
    ]
    metrics = _metrics(rows)
    made = Table(title=escape(title))
    for column in (*names, *map(escape, metrics), "network calls per image", "seconds per image"):
        made.add_column(column, overflow="fold")
    for row in rows:
        found = {result["metric"]: result for result in row.results}
        seconds = row.record["samples"].get("seconds_per_image")
        made.add_row(
            *(_setting(getattr(row.spec, name)) for name in names),
            *(_number(found.get(metric)) for metric in metrics),
            str(row.network_calls),
            "-" if seconds is None else f"{seconds:.3g}",
        )
    return made


def _csv(rows: Sequence[Row]) -> str:
    metrics = _metrics(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(SamplerSpec)]
    bars = [column for metric in metrics for column in (metric, f"{metric}, 1 sd")]
    writer.writerow([*names, *bars, "n", "network_calls_per_image", "seconds_per_image", "record"])
    for row in rows:
        found = {result["metric"]: result for result in row.results}
        numbers = [found.get(metric, {}).get(name) for metric in metrics for name in ("value", "error")]
        samples = row.record["samples"]
        writer.writerow([
            *(_setting(getattr(row.spec, name)) for name in names), *numbers,
            samples["n"], row.network_calls, samples.get("seconds_per_image"), row.path.name,
        ])  # fmt: skip
    return text.getvalue()


def _metrics(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(result["metric"] for row in rows for result in row.results))


def _hash(rows: Sequence[Row]) -> str:
    return sha256_of_json([row.path.name for row in rows])[:8]


def _number(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "-"
    return results.with_error(result["value"], result["error"])


def _setting(value: Any) -> str:
    if value is None:
        return "all"  # steps, or the whole of an interval
    return ":".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
