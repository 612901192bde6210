"""What a workdir's files say about a run: settings, curves, distances, grids. Reads, and computes nothing."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fooddiff.files.hashes import sha256_of_json
from fooddiff.runs.record import read_scalars
from fooddiff.sample.spec import SamplerSpec
from fooddiff.settings import flatten

# what a training writes; other pictures are the user's
GRID_NAME = re.compile(r"step_(\d+)_(raw|ema_[\d.]+(?:_unguided)?)\.png")
ONE_STEP_NAME = re.compile(r"step_(\d+)_(?:raw|ema_[\d.]+)_one_step\.png")


class ReportError(ValueError):
    """A file that a report cannot be made of; the message names it."""


class Curve(NamedTuple):
    """A number over steps; both have one axis and equal length."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What two distances must have in common to be compared."""

    metric: str
    n: int
    resize: str
    reference: str
    reference_sha256: str
    sampler: str

    def __str__(self) -> str:
        return f"{self.metric}, n = {self.n:,}, {self.sampler}, {self.resize} resize, against {self.reference}"


@dataclass(frozen=True, kw_only=True)
class Distance:
    """One number of one evaluation, with where it comes from."""

    conditions: Conditions
    step: int
    weights: str  # "raw", "ema_<rate>" or "power_<length>"
    value: float
    error: float | None  # one standard deviation
    bias: float | None
    seed: int  # of the samples
    path: Path


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A distance between real images and the reference: what a perfect model would reach with as many samples."""

    metric: str
    n: int
    resize: str
    reference_sha256: str
    value: float
    samples: str
    path: Path

    def belongs_to(self, conditions: Conditions) -> bool:
        """Whether it was measured as those distances were, but for n."""
        return (self.metric, self.resize, self.reference_sha256) == (
            conditions.metric,
            conditions.resize,
            conditions.reference_sha256,
        )


TOPS = ("top1", "top5")
"""Whether a classifier's first choice is the class, and whether one of its first five is."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often a classifier of real images reads in samples the class that they were drawn for, as shares."""

    judge: str  # the beginning of its hash
    sampler: str
    step: int
    weights: str
    n: int
    seed: int
    of_samples: Mapping[str, float]  # by `TOPS`
    of_real_images: Mapping[str, float]  # of the test split
    distance: float | None  # Fréchet distance between both in the judge's features; older records have none
    path: Path

    @property
    def conditions(self) -> str:
        """What two such numbers must have in common to be compared."""
        by = f"classifier {self.judge}, n = {self.n:,}"
        return f"{by}, {self.sampler}, {self.weights} weights, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its workdir tells it."""

    name: str
    workdir: Path
    config: Mapping[str, Any]  # dotted names
    versions: Mapping[str, str]
    records: Sequence[Mapping[str, float | None]]  # of metrics.jsonl
    distances: Sequence[Distance]
    agreements: Sequence[Agreement]
    grids: Mapping[str, Mapping[int, Path]]  # by weights and step
    one_steps: Mapping[int, Path]  # pictures of predictions in one step, by training step

    def curve(self, name: str) -> Curve:
        """A column of metrics.jsonl; numbers that were not finite are left out."""
        pairs = [(record["step"], record[name]) for record in self.records if record.get(name) is not None]
        return Curve(*np.array(sorted(pairs), np.float64).reshape(-1, 2).T)

    def images_at(self, steps: np.ndarray) -> np.ndarray:
        """How many images, repeated ones included, a run had been trained on after so many steps.

        Raises:
            ReportError: the config does not say how many a step takes.
        """
        try:
            return steps * self.config["train.batch_size"]
        except (KeyError, TypeError) as error:
            raise ReportError(
                f"{self.workdir / 'config.json'} has no number train.batch_size, so images cannot be counted"
            ) from error

    def hours_at(self, steps: np.ndarray) -> np.ndarray:
        """How many hours training itself, without grids, scores and checkpoints, took to do so many steps.

        Steps after the last record count at its speed.

        Raises:
            ReportError: metrics.jsonl does not tell the speed up to those steps.
        """
        ends, speeds = self.curve("perf/images_per_second")
        if not len(speeds) or not (speeds > 0).all():
            path = self.workdir / "metrics.jsonl"
            raise ReportError(f"{path} does not tell the speed of every step, so the run cannot be drawn over hours")
        if (last := np.max(steps, initial=0)) > ends[-1]:  # after the last record a run is stopped and saved
            ends, speeds = np.append(ends, last), np.append(speeds, speeds[-1])
        ends = np.concatenate([[0.0], ends])
        seconds = np.cumsum(np.concatenate([[0.0], self.images_at(np.diff(ends)) / speeds]))
        return np.interp(steps, ends, seconds / 3600)

    @cached_property
    def steps(self) -> int:
        """The last step that was recorded; 0 if none was."""
        return max((record["step"] for record in self.records), default=0)


def read_run(workdir: Path, name: str) -> Run:
    """Reads a workdir.

    Args:
        workdir: a directory that run_train.py has written; evaluations and grids may be missing.
        name: what the report calls it.

    Raises:
        ReportError: the directory holds no run, or a file of it is damaged.
    """
    if not (workdir / "config.json").is_file():
        raise ReportError(f"no run in {workdir}: expected a directory that run_train.py has written")
    versions = workdir / "versions.json"
    try:
        records = read_scalars(workdir)
    except (ValueError, OSError) as error:
        raise ReportError(str(error)) from error
    evaluations = sorted((workdir / "eval").glob("*.json"))
    distances = [d for path in evaluations for d in read_distances(path)]
    agreements = [a for path in evaluations for a in read_agreements(path)]
    return Run(
        name=name,
        workdir=workdir,
        config=flatten(_read_json(workdir / "config.json")),
        versions=_read_json(versions) if versions.is_file() else {},
        records=records,
        distances=sorted(distances, key=lambda d: (str(d.conditions), d.weights, d.step)),
        agreements=sorted(agreements, key=lambda a: (a.judge, a.sampler, a.weights, a.step, a.seed)),
        grids=_find_grids(workdir / "samples"),
        one_steps={
            int(match[1]): path
            for path in (workdir / "samples").glob("*.png")
            if (match := ONE_STEP_NAME.fullmatch(path.name))
        },
    )


def read_distances(path: Path) -> list[Distance]:
    """Reads the numbers of one record of `fooddiff.eval` about a model; another kind of record has none.

    Raises:
        ReportError: the file is damaged.
    """
    record = _read_json(path)
    try:
        if "judge" in record or "step" not in record.get("samples", {}).get("made_by", {}):
            return []  # class agreement, bits/dim, or images that no model made
        made_by, reference = record["samples"]["made_by"], record["reference"]
        return [
            Distance(
                conditions=Conditions(
                    metric=str(result["metric"]),
                    n=int(result["n"]),
                    resize=str(record["resize"]),
                    reference=str(reference["name"]),
                    reference_sha256=str(reference["identity"]["sha256"]),
                    sampler=_sampler(made_by),
                ),
                step=int(made_by["step"]),
                weights=str(made_by["weights"]),
                value=float(result["value"]),
                error=_optional(result["error"]),
                bias=_optional(result["bias"]),
                seed=int(made_by["seed"]),
                path=path,
            )
            for result in record["results"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is not a record of an evaluation: {error!r}") from error


def read_agreements(path: Path) -> list[Agreement]:
    """Reads the numbers of one record of `fooddiff.eval agreement`; another kind of record has none.

    Raises:
        ReportError: the file is damaged.
    """
    record = _read_json(path)
    if "judge" not in record:
        return []
    try:
        made_by = record["samples"]["made_by"]
        numbers = {result["metric"].partition("[")[0]: float(result["value"]) for result in record["results"]}
        return [
            Agreement(
                judge=str(record["judge"]["sha256"])[:8],
                sampler=_sampler(made_by),
                step=int(made_by["step"]),
                weights=str(made_by["weights"]),
                n=int(record["samples"]["n"]),
                seed=int(made_by["seed"]),
                of_samples={top: numbers[f"agreement-{top}"] for top in TOPS},
                of_real_images={top: numbers[f"accuracy-{top}"] for top in TOPS},
                distance=next((value for name, value in numbers.items() if name.startswith("FD-")), None),
                path=path,
            )
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is not a record of class agreement: {error!r}") from error


def _sampler(made_by: Mapping[str, Any]) -> str:
    """How samples were drawn, by what they were guided and by what enlarged."""
    title, recipe = SamplerSpec.from_json(made_by["sampling"]).title, made_by.get("recipe", {})
    if guide := recipe.get("guide"):
        title += f", by step {guide['step']} {guide['weights']} ({guide['weights_sha256'][:8]})"
    if classifier := recipe.get("classifier"):
        title += f", by classifier {classifier['weights_sha256'][:8]}"
    if upsampler := recipe.get("upsampler"):
        title += f", enlarged by {sha256_of_json(upsampler)[:8]}"
    return title


def read_floors(path: Path) -> list[Floor]:
    """Reads the numbers of a record of `python -m fooddiff.eval images REAL REFERENCE`.

    Raises:
        ReportError: the file is not such a record.
    """
    record = _read_json(path)
    try:
        made_by = record["samples"]["made_by"]
        floors = [
            Floor(
                metric=str(result["metric"]),
                n=int(result["n"]),
                resize=str(record["resize"]),
                reference_sha256=str(record["reference"]["identity"]["sha256"]),
                value=float(result["value"]),
                samples=str(record["samples"]["name"]),
                path=path,
            )
            for result in record["results"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is not a record of an evaluation: {error!r}") from error
    if made_by:
        raise ReportError(f"{path} is about images that a model made: expected real images against the reference")
    return floors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        error = "it holds no JSON object"
    except (OSError, ValueError, RecursionError) as reason:
        error = reason
    raise ReportError(f"{path} cannot be read: {error}")


def _optional(number: float | None) -> float | None:
    return None if number is None else float(number)


def _find_grids(folder: Path) -> dict[str, dict[int, Path]]:
    grids = {}
    for path in sorted(folder.glob("*.png")):
        if match := GRID_NAME.fullmatch(path.name):
            grids.setdefault(match[2], {})[int(match[1])] = path
    return grids
