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
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")


def run(config: ConfigDict, topology: str) -> dict[str, Quantity]:
    """Compiles the train step ahead of time. All numbers are the compiler's and per chip; nothing is run.

    Args:
        config: what to train; config.train.batch_size is that of all chips together.
        topology: a kind of chip and how many there are, for instance "v5e:2x2".

    Returns:
        The numbers by name. The roofline takes work, memory and network as if each ran alone at its published rate.

    Raises:
        ValueError: an unknown topology.
        ModuleNotFoundError: libtpu is missing.
    """
    mesh = jax.sharding.Mesh(np.asarray(_devices(topology)), ("data",))
    training = build.make_training(config, mesh)
    step = jax.jit(training.step, donate_argnums=0, out_shardings=training.state_sharding)
    start = time.perf_counter()
    program = step.lower(*build.abstract_step_arguments(config, training)).compile()
    seconds = time.perf_counter() - start
    cost, memory, chip = program.cost_analysis(), program.memory_analysis(), CHIPS[topology.split(":")[0]]
    collectives = collective_bytes(program.as_text())
    times = {
        "work": cost["flops"] / chip.flops,
        "memory": cost["bytes accessed"] / chip.bandwidth,
        "network": sum(collectives.values()) / chip.network,
    }
    numbers = {
        "chips": exactly(mesh.size, ""),
        "compilation": exactly(seconds, "s"),
        "arguments": exactly(memory.argument_size_in_bytes, "bytes"),
        "temporaries": exactly(memory.temp_size_in_bytes, "bytes"),
        "work": exactly(cost["flops"], "FLOP"),
        "memory traffic": exactly(cost["bytes accessed"], "bytes"),
    }
    numbers |= {name: exactly(size, "bytes") for name, size in collectives.items()}
    numbers |= {f"roofline, {name}": exactly(each, "s") for name, each in times.items()}
    rate = config.train.batch_size / max(times.values())
    return numbers | {"roofline, all chips": exactly(rate, "images/s at most")}


def collective_bytes(hlo: str) -> dict[str, float]:
    """Bytes that each kind of collective gives out per chip, from the text of a compiled program."""
    sizes: dict[str, float] = {}
    for shapes, kind, _ in _COLLECTIVE.findall(hlo):
        for dtype, dimensions in _ARRAY.findall(shapes):
            width = int(re.sub(r"\D", "", dtype)) / 8
            sizes[kind] = sizes.get(kind, 0.0) + width * math.prod(int(n) for n in dimensions.split(",") if n)
    return sizes


def _devices(topology: str) -> list[jax.Device]:
    kind = topology.split(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"--topology is {topology!r}, expected one of {', '.join(CHIPS)} and a shape, as in v5e:2x2")
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (RuntimeError, ModuleNotFoundError, NotImplementedError) as error:
        raise ModuleNotFoundError(
            f"cannot compile for {topology} ({str(error).splitlines()[0]}): pip install 'jax[tpu]', which brings libtpu"
        ) from error
