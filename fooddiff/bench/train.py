"""The train step of a config, on random images, against a matmul and against the same step in PyTorch."""

from contextlib import ExitStack
from typing import Any

import jax
from ml_collections import ConfigDict

from fooddiff import build, keys, parallel
from fooddiff.arrays import Batch
from fooddiff.bench.measure import Program, Quantity, compiled, exactly, interleaved, matmul, quantity, ratios, timed
from fooddiff.bench.reference import Peer, started, unet_settings
from fooddiff.train.state import TrainState
from fooddiff.xla import jit


def run(config: ConfigDict, *, repetitions: int, peer: Peer | None) -> dict[str, Quantity]:
    """Times the step as training runs it: compiled ahead of time, with its state donated.

    Args:
        config: what to train; its data are not read.
        repetitions: rounds that count.
        peer: PyTorch, if it is to be compared: improved-diffusion for a UNet, `peer/uvit.py` for a U-ViT.

    Returns:
        The numbers by name.

    Raises:
        ValueError: the peer does not learn with this optimizer; said before anything is compiled.
    """
    mesh = parallel.make_mesh()
    training = build.make_training(config, mesh)
    asked = None if peer is None else _peer_settings(config, training.abstract_state)
    key = keys.root(config.seed, training.replicated)
    batch = random_batch(config, training)
    state = build.first_state(training, key, {})
    step = jit(training.step, donate_argnums=0, out_shardings=training.state_sharding)
    program = compiled(step, state, batch, key)

    def ours() -> float:
        nonlocal state

        def once():
            nonlocal state
            state = program.call(state, batch, key)
            return state

        return timed(once)

    peak, peak_flops = matmul(build.DTYPES[config.model.dtype])
    with ExitStack() as stack:
        tasks = {"ours": ours, "matmul": peak}
        if peer is not None:
            tasks["peer"] = stack.enter_context(started(peer, asked))
        seconds = interleaved(tasks, repetitions)
    numbers = of_program(program, seconds["ours"], config.train.batch_size, mesh.size)
    rates = [peak_flops / each * mesh.size for each in seconds["matmul"]]
    numbers["matmul peak"] = quantity(rates, "FLOP/s")
    numbers["utilisation"] = quantity(
        [program.flops * mesh.size / each / rate for each, rate in zip(seconds["ours"], rates, strict=True)],
        "of the peak",
    )
    if peer is not None:
        name = "PyTorch" if peer.checkout is None else "improved-diffusion"
        numbers[name] = quantity([config.train.batch_size / each for each in seconds["peer"]], "images/s")
        numbers["ratio"] = ratios(seconds["ours"], seconds["peer"])
    return numbers


def _peer_settings(config: ConfigDict, state: TrainState) -> dict[str, Any]:
    """What the peer's worker is to prepare."""
    shared = {"batch_size": config.train.batch_size, "ema_rates": list(config.ema.rates)}
    if config.model.network == "unet":
        return shared | {"task": "train"} | unet_settings(config)
    if config.optimizer.get("name", "adam") != "adamw":
        raise ValueError("the peer learns with AdamW: give --config.optimizer.name=adamw, too")
    model = config.model.to_dict() | {"image_size": config.data.image_size}
    return shared | {
        "task": "train_uvit",
        "model": {name: value for name, value in model.items() if name not in ("network", "dtype")},
        "parameters": sum(leaf.size for leaf in state.params.values()),
        "averages": len(state.ema),
    }


def random_batch(config: ConfigDict, training: build.Training) -> Batch:
    """A batch of the config's shape on the devices."""
    n, classes = config.train.batch_size, config.model.get("num_classes") or 1
    stored = build.abstract_step_arguments(config, training)[1].pixels

    def draw() -> Batch:
        pixels = jax.random.randint(jax.random.key(1), stored.shape, 0, 256).astype(stored.dtype)
        return Batch(pixels, {"y": jax.random.randint(jax.random.key(2), (n,), 0, classes)})

    return jit(draw, out_shardings=training.over_data)()


def of_program(program: Program, seconds: list[float], images: int, devices: int) -> dict[str, Quantity]:
    """The numbers that every timed program has."""
    return {
        "images": quantity([images / each for each in seconds], "images/s"),
        "one call": quantity(seconds, "s"),
        "compilation": exactly(program.compile_seconds, "s"),
        "work": exactly(program.flops * devices, "FLOP per call"),
        "rate": quantity([program.flops * devices / each for each in seconds], "FLOP/s"),
        "memory traffic": exactly(program.bytes_moved, "bytes per call and device, as compiled"),
        "peak memory": exactly(program.peak_bytes, "bytes per device, as compiled"),
    }
