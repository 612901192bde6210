r"""Measures how fast this machine trains, samples, scores, reads and starts.

python -m fooddiff.bench {train,sample,eval,data,compile} --config=configs/hybrid.py [--config.train.batch_size=4] \
    [--reference=improved-diffusion --reference_python=venv/bin/python] [--repetitions=7] [--json=FILE]
"""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from fooddiff.commands import terminal

CONFIG = config_flags.DEFINE_config_file("config", None, "the config; eval needs none")
REFERENCE = flags.DEFINE_string("reference", None, "a checkout of openai/improved-diffusion to compare with")
REFERENCE_PYTHON = flags.DEFINE_string(
    "reference_python", None, "the Python of an environment with torch, and with torch-fidelity for eval"
)
TOPOLOGY = flags.DEFINE_string("topology", None, "compile: for TPUs that are not here, as in v5e:2x2; needs libtpu")
REPETITIONS = flags.DEFINE_integer("repetitions", 7, "rounds that count; numbers are their median, least and greatest")
JSON = flags.DEFINE_string("json", None, "a file for the numbers")

BENCHMARKS = ("train", "sample", "eval", "data", "compile")


def main(argv: list[str]) -> None:
    """Runs one benchmark and prints its table."""
    if len(argv) != 2 or argv[1] not in BENCHMARKS:
        raise app.UsageError(f"expected one of {', '.join(BENCHMARKS)}, got {argv[1:]}")
    with terminal.session(distributed=False):
        _run(argv[1])


def _run(what: str) -> None:
    from fooddiff.bench import compile as startup
    from fooddiff.bench import data, eval, sample, table, topology, train
    from fooddiff.bench.reference import Peer

    if CONFIG.value is None and what != "eval":
        raise ValueError("--config is missing, for instance --config=configs/hybrid.py")
    if REPETITIONS.value < 1:
        raise ValueError(f"--repetitions is {REPETITIONS.value}, expected at least 1")
    needs_checkout = what in ("train", "sample")
    if REFERENCE.value is not None and (REFERENCE_PYTHON.value is None or not needs_checkout):
        raise ValueError("--reference is for train and sample, and needs --reference_python: a Python that has torch")
    peer = None
    if REFERENCE_PYTHON.value is not None and (REFERENCE.value is not None or what == "eval"):
        peer = Peer(Path(REFERENCE_PYTHON.value).absolute(), REFERENCE.value and Path(REFERENCE.value).absolute())
    repetitions = REPETITIONS.value
    caption = f"{table.processor()}; {repetitions} repetitions"
    match what:
        case "train":
            numbers = train.run(CONFIG.value, repetitions=repetitions, peer=peer)
        case "sample":
            numbers = sample.run(CONFIG.value, repetitions=repetitions, peer=peer)
        case "eval":
            numbers = eval.run(repetitions=repetitions, peer=peer)
        case "data":
            numbers = data.run(CONFIG.value, repetitions=repetitions)
        case "compile" if TOPOLOGY.value is not None:
            numbers = topology.run(CONFIG.value, TOPOLOGY.value)
            caption = "per chip, as the compiler says; nothing was run"
        case "compile":
            arguments = [argument for argument in sys.argv[1:] if argument.startswith("--config")]
            numbers = startup.run(arguments, repetitions=repetitions)
    table.show(f"bench {what}", numbers, caption)
    if JSON.value is not None:
        table.write(Path(JSON.value), " ".join(sys.argv[1:]), numbers)


if __name__ == "__main__":
    app.run(main, flags_parser=terminal.parse_flags)
