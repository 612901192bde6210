"""Figures of runs, drawn with Matplotlib: the same drawing serves the page (SVG) and documents (SVG and PNG).

Colour tells settings apart, line style the seeds; both palettes hold on a light and on a dark page and for colour-blind
readers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from fooddiff.files.atomic import atomic_path
from fooddiff.report.curves import smooth, thin
from fooddiff.report.runs import Agreement, Conditions, Distance, Floor, Run

LARGER_IS_BETTER = ("PSNR", "SSIM", "Precision", "Recall", "IS")  # how the names of such metrics begin
COLOURS = ("#2f7fc1", "#d9730d", "#1a9e6c", "#b2559b", "#9a8500", "#7a6ff0")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = ("o", "s", "^", "D")
INK = "#3a3f47"  # of axes and text; the page replaces it by its own
GRID = "#8a909a"
SIZE = (4.2, 3.3)  # inches
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "fooddiff",  # the same data give the same file
}
SCALES = ("log", "linear")


class Axis(NamedTuple):
    """What curves are drawn over."""

    name: str
    label: str
    of: Callable[[Run, np.ndarray], np.ndarray]  # steps of a run -> where they lie


AXES = {
    axis.name: axis
    for axis in (
        Axis("steps", "step", lambda run, steps: steps),
        Axis("images", "images trained on", Run.images_at),
        Axis("hours", "hours of training", Run.hours_at),
    )
}


class Style(NamedTuple):
    """How a run is drawn everywhere."""

    colour: str
    dash: str | tuple
    marker: str


@dataclass(frozen=True)
class Drawing:
    """A figure, what a reader who cannot see it is told, and the titles of its points.

    Attributes:
        name: of its files.
        figure: the figure.
        alt: its content in words.
        titles: for each group of markers, by its id in the SVG, the provenance of every marker.
    """

    name: str
    figure: Figure
    alt: str
    titles: Mapping[str, Sequence[str]] = field(default_factory=dict)


def styles(runs: Sequence[Run]) -> dict[str, Style]:
    """A style for each run: runs that differ by their seed alone share a colour."""
    groups: dict[str, int] = {}
    members: dict[str, int] = {}
    found = {}
    for run in runs:
        settings = json.dumps({name: value for name, value in run.config.items() if name != "seed"}, sort_keys=True)
        group = groups.setdefault(settings, len(groups))
        member = members[settings] = members.get(settings, -1) + 1
        found[run.name] = Style(
            COLOURS[group % len(COLOURS)], DASHES[member % len(DASHES)], MARKERS[member % len(MARKERS)]
        )
    return found


def loss(runs: Sequence[Run], axis: Axis, *, scale: str) -> Drawing | None:
    """The training loss, as recorded and smoothed; None if no run has one."""

    def draw(axes: Axes) -> bool:
        return _curves(axes, runs, axis, "train/loss")

    last = [
        f"{run.name} ends at {smooth(curve).values[-1]:.3g}"
        for run in runs
        if len((curve := run.curve("train/loss")).steps)
    ]
    alt = f"Training loss over {axis.name}: {'; '.join(last)}."
    return _figure(f"loss_{scale}", draw, axis, "training loss", scale, alt)


def curve(runs: Sequence[Run], axis: Axis, column: str, label: str, *, name: str, scale: str) -> Drawing | None:
    """A number of metrics.jsonl; None if no run has it."""

    def draw(axes: Axes) -> bool:
        return _curves(axes, runs, axis, column)

    return _figure(f"{name}_{scale}", draw, axis, label, scale, f"{label[0].upper()}{label[1:]}, over {axis.name}.")


def distance(
    runs: Sequence[Run], axis: Axis, conditions: Conditions, weights: str, floors: Sequence[Floor], *, name: str,
    scale: str,
) -> Drawing | None:  # fmt: skip
    """A distance for one kind of weights, with error bars, floors and the best step of each run.

    Args:
        runs: runs; those without such a distance are left out.
        axis: what it is drawn over.
        conditions: which distances.
        weights: "raw", "ema_<rate>" or "power_<length>".
        floors: those that belong to the conditions.
        name: of the drawing's files.
        scale: "log" or "linear".

    Returns:
        The drawing; None if no run has such a distance.
    """
    titles, told = {}, []
    look = styles(runs)

    def draw(axes: Axes) -> bool:
        for index, run in enumerate(runs):
            points = select(run, conditions, weights)
            if not points:
                continue
            colour, dash, marker = look[run.name]
            at, values = axis.of(run, np.array([p.step for p in points])), [p.value for p in points]
            bars = [p.error or 0.0 for p in points]
            axes.errorbar(at, values, bars, fmt="none", ecolor=colour, elinewidth=1, capsize=2, alpha=0.7)
            axes.plot(
                at, values, color=colour, linestyle=dash, marker=marker, markersize=4, label=_label(run),
                gid=f"points-{index}",
            )  # fmt: skip
            best = best_of(points)
            axes.plot(
                at[points.index(best)],
                best.value,
                marker,
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=colour,
            )
            titles[f"points-{index}"] = [provenance(run, p) for p in points]
            told.append(f"{run.name} is best at step {best.step:,} with {best.value:.3g}")
        for floor in floors:
            axes.axhline(floor.value, color=INK, linewidth=1, linestyle=":", label=f"real images, n = {floor.n:,}")
        return bool(titles)

    label = f"{conditions.metric.split('[')[0]}, {weights} weights"
    drawing = _figure(f"{name}_{scale}", draw, axis, label, scale, "")
    if drawing is None:
        return None
    alt = f"{conditions}, {weights} weights, over {axis.name}: {'; '.join(told)}."
    return replace(drawing, alt=alt, titles=titles)


def agreement(runs: Sequence[Run], axis: Axis, shown: Agreement, *, name: str, scale: str) -> Drawing:
    """How often a classifier's first choice is the class that a sample was drawn for; dotted: the same of real images.

    Args:
        runs: runs; those without such a number are left out.
        axis: what it is drawn over.
        shown: one of the numbers; the others are those that were measured as it was.
        name: of the drawing's files.
        scale: "log" or "linear".
    """

    def draw(axes: Axes) -> bool:
        axes.axhline(shown.of_real_images["top1"], color=INK, linewidth=1, linestyle=":", label="real images")
        return _judged(axes, runs, axis, shown, lambda found: found.of_samples["top1"])

    alt = f"Class agreement, {shown.conditions}, over {axis.name}."
    drawing = _figure(f"{name}_{scale}", draw, axis, "class agrees", scale, alt)
    drawing.figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    return drawing


def judged_distance(runs: Sequence[Run], axis: Axis, shown: Agreement, *, name: str, scale: str) -> Drawing | None:
    """The Fréchet distance in that classifier's features, arguments as for `agreement`; None if no record has it."""

    def draw(axes: Axes) -> bool:
        return _judged(axes, runs, axis, shown, lambda found: found.distance)

    alt = f"Distance, {shown.conditions}, over {axis.name}."
    return _figure(f"{name}_{scale}", draw, axis, "classifier's distance", scale, alt)


def best_of(points: Sequence[Distance]) -> Distance:
    """The least distance or, of what is the better the larger it is, the largest."""
    choose = max if points[0].conditions.metric.startswith(LARGER_IS_BETTER) else min
    return choose(points, key=lambda point: point.value)


def select(run: Run, conditions: Conditions, weights: str) -> list[Distance]:
    """A run's distances under some conditions, for some weights, by step."""
    found = [d for d in run.distances if d.conditions == conditions and d.weights == weights]
    return sorted(found, key=lambda d: d.step)


def provenance(run: Run, distance: Distance) -> str:
    """Where a number comes from, in a line."""
    error = "" if distance.error is None else f" ± {distance.error:.2g}"
    return (
        f"{run.name}, step {distance.step:,}, {distance.weights}: {distance.value:.4g}{error}\n{distance.conditions}, "
        f"seed {distance.seed}\n{distance.path.name}"
    )


def save(drawing: Drawing, folder: Path) -> None:
    """Writes a drawing as SVG and PNG on white, which stays legible on a dark page."""
    with mpl.rc_context(STYLE):
        for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 200})):
            with atomic_path(folder / f"{drawing.name}.{suffix}") as temporary:
                drawing.figure.savefig(temporary, format=suffix, facecolor="white", **options)


def _figure(name: str, draw: Callable[[Axes], bool], axis: Axis, label: str, scale: str, alt: str) -> Drawing | None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes):
            return None
        axes.set_xlabel(axis.label)
        axes.set_ylabel(label)
        axes.set_yscale(scale)
        if scale == "log":
            _plain_ticks(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        columns = 1 if max(map(len, axes.get_legend_handles_labels()[1])) > 22 else 2
        figure.legend(loc="outside lower center", ncols=columns)
    return Drawing(name, figure, alt)


def _label(run: Run) -> str:
    """The run's name; Matplotlib leaves out of legends what begins with an underscore."""
    return f"\u200b{run.name}" if run.name.startswith("_") else run.name


def _short(number: float, position: int) -> str:
    """0.5, 200, 1.5k."""
    return f"{number:g}" if abs(number) < 1000 else EngFormatter(sep="")(number)


def _plain_ticks(axes: Axes) -> None:
    """Labels a logarithmic axis 0.1, 0.2, 0.5 and not in powers of ten, more densely if it spans little."""
    low, high = axes.get_ylim()
    labelled = (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=labelled))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curves(axes: Axes, runs: Sequence[Run], axis: Axis, name: str) -> bool:
    drawn = False
    for run, style in zip(runs, styles(runs).values(), strict=True):
        curve = run.curve(name)
        if not len(curve.steps):
            continue
        raw, smoothed = thin(curve), thin(smooth(curve))
        axes.plot(axis.of(run, raw.steps), raw.values, color=style.colour, linewidth=0.8, alpha=0.45, gid="raw")
        axes.plot(
            axis.of(run, smoothed.steps), smoothed.values, color=style.colour, linestyle=style.dash, label=_label(run),
            gid="smooth",
        )  # fmt: skip
        drawn = True
    return drawn


def _judged(
    axes: Axes, runs: Sequence[Run], axis: Axis, shown: Agreement, of: Callable[[Agreement], float | None]
) -> bool:
    drawn = False
    for run, (colour, dash, marker) in zip(runs, styles(runs).values(), strict=True):
        found = [each for each in run.agreements if each.conditions == shown.conditions and of(each) is not None]
        if not found:
            continue
        steps, values = zip(*sorted((each.step, of(each)) for each in found), strict=True)
        at = axis.of(run, np.array(steps))
        axes.plot(at, values, color=colour, linestyle=dash, marker=marker, markersize=4, label=_label(run))
        drawn = True
    return drawn
