"""Says what a training run would cost, without touching data: counted from the compiled step, and timed on noise."""

import math
import os
import statistics
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from fooddiff import build, keys, parallel
from fooddiff.bench.train import random_batch
from fooddiff.train.state import TrainState
from fooddiff.xla import jit

MAX_STEPS, MAX_SECONDS = 6, 20.0  # timed steps; one is taken however long it lasts


def run(config: ConfigDict) -> None:
    """Prints parameters, FLOPs, memory per device and the data plan of a config, and then what steps take here."""
    mesh = parallel.make_mesh()
    training, n = build.make_training(config, mesh), config.train.batch_size
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(training.abstract_state.params))
    step = jit(training.step, donate_argnums=0, out_shardings=training.state_sharding)
    compiled = step.lower(*build.abstract_step_arguments(config, training)).compile()
    flops = compiled.cost_analysis()["flops"] * mesh.size
    memory = compiled.memory_analysis()
    data, train = config.data, config.train
    console = Console()

    table = Table(title="Dry run: nothing was read, downloaded or trained", show_header=False)
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("devices", f"{mesh.size} x {jax.devices()[0].device_kind}")
    table.add_row("FLOP per image", f"{flops / n / 1e9:.3g} GFLOP, trained once")
    table.add_row("FLOP per step", f"{flops / 1e9:.3g} GFLOP ({n} images)")
    table.add_row(
        "the whole run", f"{flops * train.steps / 1e15:.3g} PFLOP: {train.steps:,} steps, {n * train.steps:,} images"
    )
    table.add_row(
        "memory per device",
        f"{memory.argument_size_in_bytes / 1e9:.2f} GB state and batch + {memory.temp_size_in_bytes / 1e9:.2f} GB "
        f"temporary, as compiled for {jax.default_backend()}",
    )
    table.add_row("data", f"{data.source}, split train, from {data.path or 'its default place'}")
    table.add_row("cache", f"{data.cache_dir}, {data.image_size}x{data.image_size} pixels, 3 bytes each")
    if "codec" in config:
        h, w, c = build.make_codec(config).shape
        table.add_row("latents", f"{h}x{w}x{c} of {data.image_size}x{data.image_size} pixels, 2 bytes a number")
    table.add_row("batches", f"{n} images a step, {n // mesh.size} on each device, {train.accumulate} microbatches")
    console.print(table)

    needed, free = memory.argument_size_in_bytes + memory.temp_size_in_bytes, _free_bytes(mesh)
    if free is None or needed > free:
        known = "is not known" if free is None else f"is {free / 1e9:.2f} GB"
        console.print(f"No step was timed: the memory left on a device {known}, a step needs {needed / 1e9:.2f} GB.")
        return
    console.print("Timing steps on made-up images (Ctrl-C leaves) ...")
    seconds = _seconds_per_step(config, training, compiled)
    console.print(
        f"Measured here, now, on made-up images: {n / seconds:.3g} images/s, {flops / seconds / 1e12:.3g} TFLOP/s; "
        f"the whole run takes {seconds * train.steps / 3600:.3g} hours of such steps, without input, grids and scores.",
        soft_wrap=True,
    )


def _seconds_per_step(config: ConfigDict, training: build.Training, step: Callable[..., TrainState]) -> float:
    """The median over steps but the first, or that one alone if it lasts long."""
    key = keys.root(config.seed, training.replicated)
    state, batch = build.first_state(training, key, {}), random_batch(config, training)
    seconds, begun = [], time.perf_counter()
    while len(seconds) < MAX_STEPS and (not seconds or time.perf_counter() - begun < MAX_SECONDS):
        started = time.perf_counter()
        state = jax.block_until_ready(step(state, batch, key))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:] or seconds)


def _free_bytes(mesh: jax.sharding.Mesh) -> int | None:
    """Memory that is left for each device of this process; None where it cannot be known."""
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
        return math.prod(map(os.sysconf, names)) // len(devices) if set(names) <= set(os.sysconf_names) else None
    found = devices[0].memory_stats()
    return found and found["bytes_limit"] - found["bytes_in_use"]
