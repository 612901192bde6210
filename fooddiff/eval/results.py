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

from fooddiff.eval.distances import Estimate
from fooddiff.eval.files import atomic_path
from fooddiff.eval.weights import InceptionWeights

BIAS_WORTH_A_WARNING = 0.05  # of the value


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number.

    Attributes:
        metric: its name, from `weights.metric_name`.
        value: the number.
        error: one standard deviation over draws of the scored set, or None.
        bias: how far the expected value lies above its limit for n -> infinity, or None.
        n: images of the scored set.
        warnings: what a reader must know before quoting the number.
    """

    metric: str
    value: float
    error: float | None
    bias: float | None
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
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


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
            f"{result['value']:.4g} ± {_figure(result['error'])}",
            _figure(result["bias"]),
            _count(result["n"]),
            escape(described),
            content["resize"],
        )
    console.print(table)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _count(n: int | None) -> str:
    return "unknown" if n is None else f"{n:,}"
