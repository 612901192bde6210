"""How a number is measured: interleaved repetitions, the median and its spread, and what the compiler knows."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MATMUL_SIZE = 2048


class Quantity(NamedTuple):
    """A measured number: the median of its repetitions, the least and the greatest."""

    median: float
    low: float
    high: float
    unit: str


class Program(NamedTuple):
    """A compiled program and what its compiler says of one call on one device."""

    call: Callable
    compile_seconds: float
    flops: float
    bytes_moved: float  # between the processor and its memory, as far as the compiler counts it
    peak_bytes: float  # arguments and temporaries


def quantity(values: list[float], unit: str) -> Quantity:
    """Summarises repetitions."""
    return Quantity(float(np.median(values)), float(min(values)), float(max(values)), unit)


def exactly(value: float, unit: str) -> Quantity:
    """A number that is known, not timed."""
    return Quantity(value, value, value, unit)


def compiled(jitted: Callable, *arguments) -> Program:
    """Lowers and compiles a jitted function for some arguments, or for their shapes.

    Returns:
        The program. Calling it runs it and never compiles.
    """
    start = time.perf_counter()
    program = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    return Program(
        program,
        seconds,
        cost.get("flops", float("nan")),
        cost.get("bytes accessed", float("nan")),
        memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    )


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleaved(tasks: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Runs tasks in turn, so that whatever else the machine does falls on all of them.

    Args:
        tasks: each does its work once and returns the seconds it took.
        repetitions: how often, after one round that does not count.

    Returns:
        The seconds of every task.
    """
    rounds = [{name: task() for name, task in tasks.items()} for _ in range(1 + repetitions)][1:]
    return {name: [each[name] for each in rounds] for name in tasks}


def matmul(dtype: jnp.dtype) -> tuple[Callable[[], float], float]:
    """A square matrix product on one device, whose rate stands for the peak.

    Returns:
        (a task for `interleaved`, its FLOPs).
    """
    a = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
    product = jax.jit(lambda a: a @ a)
    return lambda: timed(lambda: product(a)), 2.0 * MATMUL_SIZE**3


def ratios(ours: list[float], theirs: list[float]) -> Quantity:
    """Our time over the peer's, round by round; below 1 we are faster."""
    return quantity([a / b for a, b in zip(ours, theirs, strict=True)], "our time / its time")
