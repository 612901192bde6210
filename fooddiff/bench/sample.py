"""The sampler of a config, noise to pixels in one compiled program, against improved-diffusion's loop."""

from contextlib import ExitStack

import numpy as np
from ml_collections import ConfigDict

from fooddiff import build, keys, parallel
from fooddiff.bench.measure import Quantity, compiled, interleaved, quantity, ratios, timed
from fooddiff.bench.reference import Peer, started, unet_settings
from fooddiff.bench.train import of_program
from fooddiff.sample.generate import sample_ids


def run(config: ConfigDict, *, repetitions: int, peer: Peer | None) -> dict[str, Quantity]:
    """Times config.sample.batch_size images with random weights.

    Args:
        config: the model, and config.sample: sampler, steps and batch size.
        repetitions: rounds that count.
        peer: improved-diffusion, if it is to be compared; it samples ancestrally in as many steps.

    Returns:
        The numbers by name.
    """
    mesh, sample = parallel.make_mesh(), config.sample
    training = build.make_training(config, mesh)
    if training.model.low_res is not None:
        raise ValueError("a model for super-resolution draws nothing by itself: its sampling has no benchmark")
    spec = build.sampler_spec(sample)
    draw = build.make_sampler(training.model, mesh, spec)
    key = keys.root(0, training.replicated)
    params = build.first_state(training, key, {}).params
    params |= {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in build.codec_tensors(config).items()}
    n = sample.batch_size
    ids = sample_ids([0], n) if config.model.num_classes is None else _spread(n, config.model.num_classes)
    program = compiled(draw, params, key, ids)
    calls = build.network_calls(training.model, spec)

    with ExitStack() as stack:
        tasks = {"ours": lambda: timed(lambda: program.call(params, key, ids))}
        if peer is not None:
            steps = len(training.model.steps(spec).remaining)
            settings = {"task": "sample", "batch_size": n, "steps": steps, **unet_settings(config)}
            tasks["reference"] = stack.enter_context(started(peer, settings))
        seconds = interleaved(tasks, repetitions)
    numbers = of_program(program, seconds["ours"], n, mesh.size)
    numbers["network calls"] = quantity([n * calls / each for each in seconds["ours"]], "images x calls/s")
    if peer is not None:
        numbers["improved-diffusion"] = quantity([n / each for each in seconds["reference"]], "images/s")
        numbers["ratio"] = ratios(seconds["ours"], seconds["reference"])
    return numbers


def _spread(n: int, classes: int) -> np.ndarray:
    return np.stack([np.arange(n) % classes, np.arange(n) // classes], axis=1).astype(np.int32)
