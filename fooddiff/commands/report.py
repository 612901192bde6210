"""The report's command: `python -m fooddiff.report WORKDIR [WORKDIR ...] --out report.html`. Owns the flags."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fooddiff.commands import flags as shared
from fooddiff.commands.terminal import plain_errors
from fooddiff.files.atomic import write_atomically
from fooddiff.report import figures
from fooddiff.report.page import make_report, render
from fooddiff.report.runs import read_floors, read_run


def main(argv: Sequence[str] | None = None) -> None:
    """Compares runs."""
    parser = shared.Parser(
        prog="python -m fooddiff.report", description="Compares runs on one page, which needs no network."
    )
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+", type=Path, help="directories of run_train.py")
    parser.add_argument("--out", type=Path, help="the page to write; report.html in the only workdir if not given")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="write every figure as SVG and PNG, too")
    parser.add_argument(
        "--over", choices=figures.AXES, default="steps",
        help="what curves are drawn over; hours are those of training alone (default: steps)",
    )  # fmt: skip
    parser.add_argument(
        "--floor", metavar="RECORD.json", action="append", type=Path, default=[],
        help="a record of `python -m fooddiff.eval images REAL REFERENCE`: what real images score; may be repeated",
    )  # fmt: skip
    flags = shared.parse(parser, argv)
    if flags.out is None and len(flags.workdirs) > 1:
        parser.error("several runs need --out, for instance --out=report.html")
    with plain_errors():
        _write(flags)


def _write(flags: argparse.Namespace) -> None:
    names = _names(flags.workdirs)
    runs = [read_run(workdir, name) for workdir, name in zip(flags.workdirs, names, strict=True)]
    floors = [floor for path in flags.floor for floor in read_floors(path)]
    report = make_report(runs, floors, figures.AXES[flags.over])
    out = flags.out or flags.workdirs[0] / "report.html"
    write_atomically(out, render(report).encode())
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    if flags.figures is not None:
        for drawing in report.drawings():
            figures.save(drawing, flags.figures)
        print(f"wrote {len(report.drawings())} figures to {flags.figures}")


def _names(workdirs: Sequence[Path]) -> list[str]:
    """The directories' last names where these differ, else their whole paths."""
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise ValueError(f"a run is given twice: {', '.join(map(str, workdirs))}")
    short = [workdir.resolve().name for workdir in workdirs]
    return short if len(set(short)) == len(short) else [str(workdir) for workdir in workdirs]
