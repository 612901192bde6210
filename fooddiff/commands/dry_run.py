"""Says what a training run would cost, without touching data or allocating a model."""

import math

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from fooddiff import build, parallel
from fooddiff.xla import jit


def run(config: ConfigDict) -> None:
    """Prints parameters, FLOPs per step, memory per device and the data plan of a config."""
    mesh = parallel.make_mesh()
    training, n = build.make_training(config, mesh), config.train.batch_size
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(training.abstract_state.params))
    step = jit(training.step, donate_argnums=0, out_shardings=training.state_sharding)
    compiled = step.lower(*build.abstract_step_arguments(config, training)).compile()
    flops = compiled.cost_analysis()["flops"] * mesh.size
    memory = compiled.memory_analysis()
    data, train = config.data, config.train

    table = Table(title="Dry run: nothing was read, downloaded or trained", show_header=False)
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("devices", f"{mesh.size} x {jax.devices()[0].device_kind}")
    table.add_row("FLOPs per step", f"{flops:.3g} ({n} images; {flops * train.steps:.3g} in {train.steps:,} steps)")
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
    Console().print(table)
