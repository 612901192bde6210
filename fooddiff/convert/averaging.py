"""Averages of any length, rebuilt from the power averages that a run keeps in its checkpoints."""

import logging
from pathlib import Path

import numpy as np

from fooddiff import build, parallel
from fooddiff.build import power_lengths
from fooddiff.convert.exporting import check_new, check_suffix, without_places, write_safetensors
from fooddiff.model.network import abstract_params
from fooddiff.runs.checkpoint import Checkpoints, choose_step
from fooddiff.runs.codec_file import check_codec, read_codec
from fooddiff.runs.load import TrainedModel, described
from fooddiff.train.averages import MAX_LENGTH, MIN_LENGTH, PowerAverage, power_name, rebuild

log = logging.getLogger(__name__)

MAX_ERROR = 0.1  # share of an average's weights over time that may be missed


def average(workdir: Path, *, length: float, step: int | None, out: Path, half: bool) -> None:
    """Writes the power average of a length as it would have been at a step, from the checkpoints that are on the disk.

    Args:
        workdir: a run's directory.
        length: width of the average as a share of the training so far.
        step: one that has a checkpoint; None takes the newest.
        out: the `.safetensors` file to write, see `exporting.export`.
        half: store it as float16.

    Raises:
        FileNotFoundError: no such workdir or checkpoint.
        FileExistsError: there already is a file of that name.
        ValueError: a length out of range, a run without power averages, or too few checkpoints for this length.
    """
    check_suffix(out, (".safetensors",))
    check_new(out)
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise ValueError(f"--length is {length}, expected a number in [{MIN_LENGTH}, {MAX_LENGTH}]")
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"no run in {workdir}: expected a directory that run_train.py has written")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = choose_step(checkpoints, step)
        meta = checkpoints.meta(step)
        config, class_names, model = described(meta, workdir / "checkpoints" / str(step))
        steps = [each for each in checkpoints.steps() if 0 < each <= step]
        stored = [PowerAverage(each, kept) for each in steps for kept in power_lengths(config.ema)]
        if not stored:
            raise ValueError(f"{workdir} has no power averages up to step {step}: see config.ema.power_lengths")
        coefficients, error = rebuild(PowerAverage(step, length), stored)
        if error > MAX_ERROR:
            raise ValueError(
                f"the {len(steps)} checkpoints up to step {step} on the disk miss {error:.0%} of the average of length "
                f"{length}, more than {MAX_ERROR:.0%}: keep more of them (config.train.keep_checkpoints), or give a "
                f"--length nearer to {' or '.join(map(str, power_lengths(config.ema)))}"
            )
        like = parallel.with_sharding(abstract_params(model.network), parallel.replicated(parallel.make_mesh()))
        params = {name: np.zeros(leaf.shape) for name, leaf in like.items()}
        for each, coefficient in zip(stored, coefficients, strict=True):
            for name, value in checkpoints.restore_weights(each.steps, like, power_name(each.length)).items():
                params[name] += coefficient * np.asarray(value, np.float64)
    codec = read_codec(workdir, build.codec_tensors(config))
    check_codec(meta.get("codec_sha256"), codec, workdir)
    params |= codec
    trained = TrainedModel(without_places(config), model, class_names, params, step, power_name(length), meta)
    write_safetensors(out, params, trained, half=half)
    log.info(
        "wrote %s: step %d, weights %s, rebuilt from %d averages in the %d checkpoints on the disk (steps %d to %d), "
        "which miss %.2g of it",
        out, step, trained.weights, len(stored), len(steps), steps[0], steps[-1], error,
    )  # fmt: skip
