r"""Measures how fast this machine trains, samples, scores, reads and starts.

python -m fooddiff.bench {train,sample,eval,data,compile} --config=configs/hybrid.py [--config.train.batch_size=4] \
    [--reference=improved-diffusion --reference_python=venv/bin/python] [--repetitions=7] [--json=FILE]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fooddiff.commands import flags as shared
from fooddiff.commands import terminal
from fooddiff.settings import check_counts

BENCHMARKS = ("train", "sample", "eval", "data", "compile")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one benchmark and prints its table."""
    flags = shared.parse(_parser(), argv)
    flags.command = " ".join(sys.argv[1:] if argv is None else argv)
    with terminal.session(distributed=False):
        _run(flags)


def _run(flags: argparse.Namespace) -> None:
    from fooddiff.bench import compile as startup
    from fooddiff.bench import data, eval, sample, table, topology, train
    from fooddiff.bench.reference import Peer

    if flags.config is None and flags.what != "eval":
        raise ValueError("--config is missing, for instance --config=configs/hybrid.py")
    check_counts("--", repetitions=flags.repetitions)
    if flags.reference is not None and (flags.reference_python is None or flags.what not in ("train", "sample")):
        raise ValueError("--reference is for train and sample, and needs --reference_python: a Python that has torch")
    config = None if flags.config is None else shared.load_config(flags.config, flags.overrides)
    peer = None
    if flags.reference_python is not None:
        if flags.what in ("data", "compile") or (flags.what == "sample" and flags.reference is None):
            raise ValueError(
                f"--reference_python is for train and eval, and with --reference for sample: not {flags.what}"
            )
        if flags.what == "train" and (flags.reference is None) != (config.model.network == "uvit"):
            raise ValueError("a UNet is compared with --reference=CHECKOUT of improved-diffusion, a U-ViT without")
        peer = Peer(flags.reference_python.absolute(), flags.reference and flags.reference.absolute())
    caption = f"{table.processor()}; {flags.repetitions} repetitions"
    match flags.what:
        case "train":
            numbers = train.run(config, repetitions=flags.repetitions, peer=peer)
        case "sample":
            numbers = sample.run(config, repetitions=flags.repetitions, peer=peer)
        case "eval":
            numbers = eval.run(repetitions=flags.repetitions, peer=peer)
        case "data":
            numbers = data.run(config, repetitions=flags.repetitions)
        case "compile" if flags.topology is not None:
            numbers = topology.run(config, flags.topology)
            caption = "per chip, as the compiler says; nothing was run"
        case "compile":
            numbers = startup.run([f"--config={flags.config}", *flags.overrides], repetitions=flags.repetitions)
    table.show(f"bench {flags.what}", numbers, caption)
    if flags.json is not None:
        table.write(flags.json, flags.command, numbers)


def _parser() -> shared.Parser:
    parser = shared.Parser(prog="python -m fooddiff.bench", description="Measures how fast this machine works.")
    parser.add_argument("what", metavar="WHAT", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--config", metavar="FILE.py", help="--config.field=value changes a field; eval needs none")
    parser.add_argument("--reference", type=Path, help="a checkout of openai/improved-diffusion to compare with")
    parser.add_argument(
        "--reference_python", type=Path,
        help="the Python of an environment with torch, and with torch-fidelity for eval",
    )  # fmt: skip
    parser.add_argument("--topology", help="compile: for TPUs that are not here, as in v5e:2x2; needs libtpu")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    return parser
