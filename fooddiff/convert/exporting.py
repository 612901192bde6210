"""Checkpoints to single files that other programs read."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from fooddiff import build
from fooddiff.commands.workdir import TrainedModel, load_trained, to_json
from fooddiff.convert.torch_zip import write_state_dict
from fooddiff.eval.files import atomic_path
from fooddiff.model.openai import check_norm_groups, to_openai

log = logging.getLogger(__name__)


def export(workdir: Path, *, step: int | None, weights: str, out: Path) -> None:
    """Writes the weights of a checkpoint to a new file.

    A `.safetensors` file has our parameter names and layouts (NHWC kernels) and, as metadata, "config" and
    "class_names" (JSON), "step" and "weights". A `.pt` file is a state dict with OpenAI's names and torch's layouts.
    Both are float32, bit for bit the checkpoint's.

    Args:
        workdir: a run's directory.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema" or "ema_<rate>".
        out: the file to write; its suffix gives the format.

    Raises:
        FileNotFoundError: no such workdir or checkpoint.
        FileExistsError: there already is a file of that name.
        ValueError: another suffix, no such weights, or a `.pt` file of a model that OpenAI's code does not know.
    """
    writers = {".safetensors": _write_safetensors, ".pt": _write_openai}
    if out.suffix not in writers:
        raise ValueError(f"--out is {out}, expected a name that ends in {' or '.join(writers)}")
    if out.exists():
        raise FileExistsError(f"{out} already exists and is left as it is: give another --out")
    trained = load_trained(workdir, step=step, weights=weights, mesh=build.make_mesh())
    params = {name: np.asarray(value) for name, value in trained.params.items()}
    with atomic_path(out) as temporary:
        writers[out.suffix](temporary, params, trained)
    log.info("wrote %s: step %d, weights %s, %d tensors", out, trained.step, trained.weights, len(params))


def _write_safetensors(path: Path, params: Mapping[str, np.ndarray], trained: TrainedModel) -> None:
    metadata = {
        "config": json.dumps(to_json(trained.config)),
        "class_names": json.dumps(trained.class_names),
        "step": str(trained.step),
        "weights": trained.weights,
    }
    safetensors.numpy.save_file(dict(params), path, metadata)


def _write_openai(path: Path, params: Mapping[str, np.ndarray], trained: TrainedModel) -> None:
    check_norm_groups(trained.config.model.norm_groups)
    write_state_dict(path, to_openai(params))
