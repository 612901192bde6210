"""What an evaluation ends in: named numbers with everything that they depend on, as JSON and as a table.

Owns the record's fields, the warnings about small n and the table's columns. Computes no distance.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fooddiff.eval.distances import Estimate, paired_difference
from fooddiff.eval.weights import InceptionWeights
from fooddiff.files.atomic import write_atomically

BIAS_WORTH_A_WARNING = 0.05  # of the value


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number.

    Attributes:
        metric: its name, from `weights.metric_name`.
        value: the number.
        error: one standard deviation over draws of the scored set, or None.
        bias: how far the expected value lies above its limit for n -> infinity, or None.
        jackknife: the number without each group of images in turn; empty if it has no such error bar.
        n: images of the scored set.
        warnings: what a reader must know before quoting the number.
    """

    metric: str
    value: float
    error: float | None
    bias: float | None
    jackknife: tuple[float, ...]
    n: int
    warnings: tuple[str, ...]


def frechet_result(metric: str, estimate: Estimate, *, n: int, dimension: int, warnings: Sequence[str]) -> Result:
    """Names a Fréchet distance and warns where n is too small for it.

    Args:
        metric: from `metric_name`.
        estimate: from `distances.frechet_estimate`.
        n: images of the scored set.
        dimension: d of the features.
        warnings: what else a reader must know, for instance about the reference.

    Returns:
        The result. It warns when the covariance is singular (n <= d) or the measured bias exceeds a twentieth
        of the value.
    """
    warnings = list(warnings)
    if n <= dimension:
        warnings.append(f"n = {n:,} images cannot fill a covariance of {dimension} dimensions: it is singular")
    if estimate.bias is None:
        warnings.append(f"n = {n:,} is too small to measure an error bar or the bias")
    elif estimate.bias > BIAS_WORTH_A_WARNING * abs(estimate.value):
        warnings.append(
            f"n = {n:,} is small: {estimate.bias:.3g} of {estimate.value:.3g} is bias, which falls as 1/n; "
            "compare only figures of equal n"
        )
    return Result(metric=metric, **estimate._asdict(), n=n, warnings=tuple(f"{metric}: {text}" for text in warnings))


def plain_result(metric: str, estimate: Estimate, *, n: int) -> Result:
    """Names a number that needs no warning about n."""
    return Result(metric=metric, **estimate._asdict(), n=n, warnings=())


def record(
    results: Sequence[Result],
    *,
    weights: InceptionWeights,
    resize: str,
    samples: dict,
    reference: dict,
    versions: dict,
) -> dict:
    """Everything about one evaluation, JSON-able.

    Args:
        results: the numbers.
        weights: the Inception weights.
        resize: the name of the resize rule.
        samples: what was scored: "name", "identity", "n", "n_per_class" and "made_by".
        reference: what it was compared with: "name", "identity", "n" and "n_per_class".
        versions: of the packages and devices that the numbers passed through.

    Returns:
        The record.
    """
    return {
        "results": [asdict(result) for result in results],
        "samples": samples,
        "reference": reference,
        "resize": resize,
        "inception": {"name": weights.name, "sha256": weights.sha256, "genuine": weights.genuine},
        "versions": versions,
    }


def write_record(path: Path, content: dict) -> None:
    """Writes a record as JSON, atomically.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def read_record(path: Path) -> dict:
    """Reads a record.

    Raises:
        ValueError: the file is not one.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for result in content["results"]:
            estimate_of(result)
        _conditions(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a record of this evaluator's `run` or `follow`: {error!r}") from error
    return content


def estimate_of(result: dict) -> Estimate:
    """The estimate in one of a record's results."""
    bars = [None if result[name] is None else float(result[name]) for name in ("error", "bias")]
    return Estimate(float(result["value"]), *bars, tuple(float(value) for value in result["jackknife"]))


def differences(a: dict, b: dict) -> list[tuple[str, Estimate, Estimate, Estimate]]:
    """Compares two records of samples that came from the same noise.

    Args:
        a: a record.
        b: another one, which differs in the weights or in how they were sampled.

    Returns:
        For each Fréchet distance its name, that of a, that of b, and a - b.

    Raises:
        ValueError: the two cannot be compared in pairs; says in what they differ.
    """
    ours, theirs = _conditions(a), _conditions(b)
    if differing := [name for name, value in ours.items() if value != theirs[name]]:
        raise ValueError(f"the records cannot be compared in pairs: they differ in {', '.join(differing)}")
    named = {result["metric"]: estimate_of(result) for result in b["results"]}
    pairs = [
        (result["metric"], estimate_of(result), named[result["metric"]])
        for result in a["results"]
        if result["metric"] in named and result["jackknife"]
    ]
    if not pairs:
        raise ValueError("the records have no Fréchet distance with an error bar in common")
    return [(metric, x, y, paired_difference(x, y)) for metric, x, y in pairs]


def _conditions(content: dict) -> dict:
    """What must be equal for a comparison in pairs."""
    samples = content["samples"]
    return {
        "the seed of the samples": int(samples["made_by"]["seed"]),
        "the number of samples": int(samples["n"]),
        "the samples per class": dict(samples["n_per_class"]),
        "the reference": str(content["reference"]["identity"]["sha256"]),
        "the resize rule": str(content["resize"]),
    }


def print_differences(a: dict, b: dict, console: Console) -> None:
    """Prints how much larger the distances of one record are than those of another; see `differences`."""
    table = Table()
    for column in ("metric", "A ± 1 sd", "B ± 1 sd", "A - B ± 1 sd", "n"):
        table.add_column(column, no_wrap=column == "metric")
    for metric, *estimates in differences(a, b):
        figures = [with_error(each.value, each.error) for each in estimates]
        table.add_row(escape(metric), *figures, _count(a["samples"]["n"]))
    console.print(table)


def print_table(content: dict, console: Console) -> None:
    """Prints a record as table rows that can be quoted: a number never stands without what it depends on."""
    table = Table()
    for column in ("metric", "value ± 1 sd", "bias", "n", "reference", "resize"):
        table.add_column(column, no_wrap=column == "metric", overflow="fold")
    reference = content["reference"]
    described = f"{reference['name']}, n = {_count(reference['n'])}"
    for result in content["results"]:
        table.add_row(
            escape(result["metric"]),
            with_error(result["value"], result["error"]),
            _figure(result["bias"]),
            _count(result["n"]),
            escape(described),
            content["resize"],
        )
    console.print(table)


def with_error(value: float, error: float | None) -> str:
    """A number and one standard deviation of it, "-" where that is not known."""
    return f"{value:.4g} ± {_figure(error)}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _count(n: int | None) -> str:
    return "unknown" if n is None else f"{n:,}"
