"""Runs to one self-contained HTML page: figures, tables, and the grids of all runs side by side."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from io import BytesIO
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from fooddiff.report import figures
from fooddiff.report.figures import AXES, SCALES, Axis, Drawing
from fooddiff.report.runs import Agreement, Conditions, Distance, Floor, ReportError, Run
from fooddiff.report.svg import inline
from fooddiff.sample.grid import read_grid
from fooddiff.settings import flatten

JPEG_QUALITY = 92
LOSS_BY_TIMESTEP = re.compile(r"train/loss_q(\d)")
LOSS_BY_LOG_SNR = re.compile(r"train/loss_log_snr_(.+)")
COLOURS = re.compile(r"samples/(.+)/colour_spread_ratio")


class Panel(NamedTuple):
    """One figure of the page, on both scales."""

    log: Drawing
    linear: Drawing


class Comparison(NamedTuple):
    """Distances that may be compared, with a panel for each kind of weights."""

    conditions: Conditions
    panels: Mapping[str, Panel]
    floors: Sequence[Floor]
    rows: Sequence[tuple[Run, Distance, bool]]  # with whether it is the run's best for its weights


class Report(NamedTuple):
    """Everything that the page shows."""

    runs: Sequence[Run]
    loss: Panel | None
    parts: Sequence[Panel]  # of the loss, by level of noise
    colours: Sequence[Panel]  # how much mean colours spread, by weights
    comparisons: Sequence[Comparison]
    judged: Mapping[str, Sequence[Panel]]  # class agreement and the judge's distance, by how they were measured

    def drawings(self) -> list[Drawing]:
        """Every figure, on each scale."""
        distances = [panel for comparison in self.comparisons for panel in comparison.panels.values()]
        judged = [panel for panels in self.judged.values() for panel in panels]
        panels = [self.loss, *self.parts, *self.colours, *distances, *judged]
        return [drawing for panel in panels if panel is not None for drawing in panel]


def make_report(runs: Sequence[Run], floors: Sequence[Floor], axis: Axis = AXES["steps"]) -> Report:
    """Draws what the runs recorded.

    Args:
        runs: at least one, in the order of the page.
        floors: distances of real images; shown with the distances that were measured as they were.
        axis: what curves are drawn over.

    Raises:
        ReportError: a floor fits none of the runs' distances, or a run does not say where its steps lie on the axis.
    """
    agreements = {found.conditions: found for run in runs for found in run.agreements}
    all_conditions = sorted({d.conditions for run in runs for d in run.distances}, key=str)
    for floor in floors:
        if not any(floor.belongs_to(conditions) for conditions in all_conditions):
            raise ReportError(
                f"{floor.path} is about {floor.metric} ({floor.resize} resize) against a reference that is not that of "
                f"the runs: expected one of {'; '.join(map(str, all_conditions)) or 'none, for no run was evaluated'}"
            )
    return Report(
        runs,
        _panel(partial(figures.loss, runs, axis)),
        _panels(runs, axis, LOSS_BY_TIMESTEP, "loss, quarter {} of t")
        + _panels(runs, axis, LOSS_BY_LOG_SNR, "loss, log SNR {}"),
        _panels(runs, axis, COLOURS, "colour spread ratio, {}"),
        [
            _comparison(runs, axis, conditions, floors, f"distance_{i}")
            for i, conditions in enumerate(all_conditions, start=1)
        ],
        {
            conditions: _judged(runs, axis, agreements[conditions], i)
            for i, conditions in enumerate(sorted(agreements), start=1)
        },
    )


def render(report: Report) -> str:
    """The page as HTML that needs no other file."""
    environment = Environment(
        loader=PackageLoader("fooddiff.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"svg": inline, "figure": _figure, "setting": _setting, "zip": zip}
    files = resources.files("fooddiff.report") / "page"
    return environment.get_template("report.html").render(
        report=report,
        styles=figures.styles(report.runs),
        scales=SCALES,
        differing=_differing(report.runs),
        facts=[_facts(run) for run in report.runs],
        grids=_grids(report.runs),
        one_steps=[_newest_one_step(run) for run in report.runs],
        style_sheet=(files / "report.css").read_text(encoding="utf-8"),
        script=(files / "report.js").read_text(encoding="utf-8"),
    )


def _panels(runs: Sequence[Run], axis: Axis, column: re.Pattern, label: str) -> list[Panel]:
    """A panel for each recorded number whose name fits; see `_order`."""
    names = sorted({name for run in runs for record in run.records for name in record})
    found = sorted(filter(None, map(column.fullmatch, names)), key=lambda match: _order(match[1]))
    panels = []
    for match in found:
        text, name = label.format(match[1].replace("_", " ")), match[0].removeprefix("train/").replace("/", "_")
        panels.append(_panel(partial(figures.curve, runs, axis, match[0], text, name=name)))
    return [panel for panel in panels if panel is not None]


def _order(name: str) -> tuple[int, float]:
    """Where `below_-8`, `-8_to_-4`, `above_8`, a number or a name stand among others of their kind."""
    side = {"below": -1, "above": 1}.get(name.split("_")[0], 0)
    number = re.search(r"-?\d+", name)
    return side, float(number[0]) if number else 0.0


def _panel(draw: Any) -> Panel | None:
    log, linear = (draw(scale=scale) for scale in SCALES)
    return None if log is None else Panel(log, linear)


def _comparison(
    runs: Sequence[Run], axis: Axis, conditions: Conditions, floors: Sequence[Floor], name: str
) -> Comparison:
    floors = [floor for floor in floors if floor.belongs_to(conditions)]
    kinds = sorted({d.weights for run in runs for d in run.distances if d.conditions == conditions})
    panels, rows = {}, []
    for kind in kinds:
        panels[kind] = _panel(partial(figures.distance, runs, axis, conditions, kind, floors, name=f"{name}_{kind}"))
        for run in runs:
            points = figures.select(run, conditions, kind)
            best = figures.best_of(points) if points else None
            rows += [(run, point, point is best) for point in points]
    return Comparison(conditions, panels, floors, rows)


def _judged(runs: Sequence[Run], axis: Axis, shown: Agreement, number: int) -> list[Panel]:
    panels = [
        _panel(partial(figures.agreement, runs, axis, shown, name=f"agreement_{number}")),
        _panel(partial(figures.judged_distance, runs, axis, shown, name=f"judged_distance_{number}")),
    ]
    return [panel for panel in panels if panel is not None]


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings and versions that are not the same in all runs, with each run's value."""
    settings = [dict(run.config) | flatten(run.versions, "versions.") for run in runs]
    names = sorted({name for of_run in settings for name in of_run})
    values = {name: [of_run.get(name, "-") for of_run in settings] for name in names}
    return {name: found for name, found in values.items() if len({json.dumps(value) for value in found}) > 1}


def _facts(run: Run) -> dict[str, str]:
    """What the table of runs says about one."""
    speed, wait, loss = (run.curve(name).values for name in ("perf/images_per_second", "perf/input_wait", "train/loss"))
    return {
        "directory": str(run.workdir),
        "objective": str(run.config.get("objective.name", "-")),
        "seed": str(run.config.get("seed", "-")),
        "steps": f"{run.steps:,} of {run.config.get('train.steps', 0):,}",
        "images per step": f"{run.config.get('train.batch_size', 0):,}",
        "images per second, median": f"{median(speed):.3g}" if len(speed) else "not recorded",
        "waiting for input, median": f"{median(wait):.1%}" if len(wait) else "not recorded",
        "last loss recorded": f"{loss[-1]:.4g}" if len(loss) else "not recorded",
        "devices": run.versions.get("devices", "not recorded"),
        "JAX": run.versions.get("jax", "not recorded"),
    }


def _grids(runs: Sequence[Run]) -> dict[str, Any]:
    """The pictures as the page's script reads them: a strip for each class of each grid, by run, weights and step."""
    pictures, names = {}, {}
    for run in runs:
        pictures[run.name] = {}
        for weights, paths in run.grids.items():
            pictures[run.name][weights] = {}
            for step, path in paths.items():
                try:
                    grid = read_grid(path)
                except ValueError as error:
                    raise ReportError(f"{error}: move it elsewhere, or draw it again with run_sample.py") from error
                names |= dict.fromkeys(grid.class_names)
                pictures[run.name][weights][str(step)] = {
                    name: _strip(images) for name, images in zip(grid.class_names, grid.images, strict=True)
                }
    kinds = sorted({weights for by_weights in pictures.values() for weights in by_weights})
    steps = sorted({int(step) for by in pictures.values() for by_step in by.values() for step in by_step})
    return {"pictures": pictures, "classes": list(names), "weights": kinds, "steps": steps}


def _newest_one_step(run: Run) -> tuple[int, str] | None:
    """The step of a run's newest picture of predictions in one step, and the picture as a data URI."""
    if not run.one_steps:
        return None
    step = max(run.one_steps)
    try:
        with Image.open(run.one_steps[step]) as picture:
            return step, _jpeg(picture.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{run.one_steps[step]} is not a picture: {error}; move it elsewhere") from error


def _strip(images: np.ndarray) -> str:
    """uint8[n, h, w, 3] side by side, as a data URI."""
    return _jpeg(Image.fromarray(np.concatenate(list(images), axis=1)))


def _jpeg(picture: Image.Image) -> str:
    """A picture as a data URI. JPEG without colour subsampling is a tenth of PNG's size."""
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
