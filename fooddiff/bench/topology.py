"""What XLA makes of the train step on TPUs that are not here: its compiler runs on any machine, through libtpu."""

import math
import re
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from fooddiff import build
from fooddiff.bench.measure import Quantity, exactly
from fooddiff.xla import compiling_for


class Chip(NamedTuple):
    """The published rates of one chip (cloud.google.com/tpu/docs)."""

    flops: float  # bf16, FLOP/s
    bandwidth: float  # of its memory, bytes/s
    network: float  # to all its neighbours together, bytes/s


CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9),
    "v5p": Chip(459e12, 2765e9, 600e9),
    "v6e": Chip(918e12, 1640e9, 448e9),
}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*?channel_id=(\d+)"
)
_ARRAY = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z-]*)\((.*?)\)", re.MULTILINE)
_MOVES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def run(config: ConfigDict, topology: str) -> dict[str, Quantity]:
    """Compiles the train step ahead of time. All numbers are the compiler's and per chip; nothing is run.

    Args:
        config: what to train; config.train.batch_size is that of all chips together.
        topology: a kind of chip and how many there are, for instance "v5e:2x2".

    Returns:
        The numbers by name. The roofline takes work, main memory and network as if each ran alone at its published
        rate; "bytes accessed", as XLA counts them, include what never leaves the chip.

    Raises:
        ValueError: an unknown topology.
        ModuleNotFoundError: libtpu is missing.
    """
    mesh = jax.sharding.Mesh(np.asarray(_devices(topology)), ("data",))
    with compiling_for("tpu"):
        training = build.make_training(config, mesh)
        step = jax.jit(training.step, donate_argnums=0, out_shardings=training.state_sharding)
        start = time.perf_counter()
        program = step.lower(*build.abstract_step_arguments(config, training)).compile()
    seconds = time.perf_counter() - start
    cost, memory, chip = program.cost_analysis(), program.memory_analysis(), CHIPS[topology.split(":")[0]]
    hlo = program.as_text()
    collectives, main_memory = collective_bytes(hlo), main_memory_bytes(hlo)
    times = {
        "work": cost["flops"] / chip.flops,
        "memory": main_memory / chip.bandwidth,
        "network": sum(collectives.values()) / chip.network,
    }
    numbers = {
        "chips": exactly(mesh.size, ""),
        "compilation": exactly(seconds, "s"),
        "arguments": exactly(memory.argument_size_in_bytes, "bytes"),
        "temporaries": exactly(memory.temp_size_in_bytes, "bytes"),
        "work": exactly(cost["flops"], "FLOP"),
        "bytes accessed": exactly(cost["bytes accessed"], "bytes"),
        "of main memory": exactly(main_memory, "bytes"),
    }
    numbers |= {name: exactly(size, "bytes") for name, size in collectives.items()}
    numbers |= {f"roofline, {name}": exactly(each, "s") for name, each in times.items()}
    rate = config.train.batch_size / max(times.values())
    return numbers | {"roofline, all chips": exactly(rate, "images/s at most")}


def collective_bytes(hlo: str) -> dict[str, float]:
    """Bytes that each kind of collective gives out per chip, from the text of a compiled program.

    A collective that runs beside other work is written several times, with one channel.
    """
    channels = {channel: (kind, shapes) for shapes, kind, channel in _COLLECTIVE.findall(hlo)}
    sizes: dict[str, float] = {}
    for kind, shapes in channels.values():
        sizes[kind] = sizes.get(kind, 0.0) + sum(size for size, _ in _arrays(shapes))
    return sizes


def main_memory_bytes(hlo: str) -> float:
    """Bytes that a program reads from and writes to the main memory of one chip, from its text.

    Every operation reads its operands and writes its results, whole, unless their layout places them in another
    memory, as `S(1)` does on the chip; a copy between memories moves the smaller of its two sides.
    """
    types: dict[str, str] = {}
    total = 0.0
    for name, result, kind, operands in _INSTRUCTION.findall(hlo[hlo.index("ENTRY ") :]):
        types[name] = result
        if kind in _MOVES_NOTHING or kind.endswith("-done"):
            continue
        if kind in ("copy-start", "slice-start"):
            sides = _arrays(result)[:2]
            total += min(size for size, _ in sides) * sum(in_main for _, in_main in sides)
        else:
            read = [types[operand] for operand in re.findall(r"%([^\s,]+)", operands)]
            total += sum(size for each in (result, *read) for size, in_main in _arrays(each) if in_main)
    return total


def _arrays(shapes: str) -> list[tuple[float, bool]]:
    """Bytes of every array in a type as HLO writes it, and whether it lies in main memory."""
    return [
        (int(re.sub(r"\D", "", dtype)) / 8 * math.prod(int(n) for n in dimensions.split(",") if n), "S(" not in layout)
        for dtype, dimensions, layout in _ARRAY.findall(shapes)
    ]


def _devices(topology: str) -> list[jax.Device]:
    kind = topology.split(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"--topology is {topology!r}, expected one of {', '.join(CHIPS)} and a shape, as in v5e:2x2")
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (RuntimeError, ModuleNotFoundError) as error:
        raise ModuleNotFoundError(
            f"cannot compile for {topology} ({str(error).splitlines()[0]}): pip install 'jax[tpu]', which brings libtpu"
        ) from error
