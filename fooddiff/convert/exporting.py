"""Checkpoints to single files that other programs read."""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from fooddiff import parallel
from fooddiff.files.atomic import atomic_path
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.model.openai import check_norm_groups, to_openai
from fooddiff.runs.load import TrainedModel, load_trained
from fooddiff.runs.weights_file import write_weights
from fooddiff.runs.workdir import to_json

log = logging.getLogger(__name__)


def export(workdir: Path, *, step: int | None, weights: str, out: Path, half: bool = False) -> None:
    """Writes the weights of a checkpoint to a new file.

    A `.safetensors` file has our parameter names and layouts (NHWC kernels) and, as metadata, "config" and
    "class_names" (JSON), "step", "images_seen" and "weights"; `fooddiff.load` and every --workdir take it. A `.pt` file
    is a state dict with OpenAI's names and torch's layouts. Both are float32, bit for bit the checkpoint's, unless
    halved.

    Args:
        workdir: a run's directory.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        out: the file to write; its suffix gives the format.
        half: store a `.safetensors` file as float16.

    Raises:
        FileNotFoundError: no such workdir or checkpoint.
        FileExistsError: there already is a file of that name.
        ValueError: another suffix, no such weights, or a `.pt` file of a model that OpenAI's code does not know.
    """
    writers = {".safetensors": partial(write_safetensors, half=half), ".pt": _write_openai}
    check_new(out, writers)
    trained = load_trained(workdir, step=step, weights=weights, mesh=parallel.make_mesh(), task=None)
    params = {name: np.asarray(value) for name, value in trained.params.items()}
    writers[out.suffix](out, params, trained)
    log.info("wrote %s: step %d, weights %s, %d tensors", out, trained.step, trained.weights, len(params))


def check_new(out: Path, suffixes: Iterable[str]) -> None:
    """Raises unless `out` is a new file with one of the suffixes."""
    if out.suffix not in suffixes:
        raise ValueError(f"--out is {out}, expected a name that ends in {' or '.join(suffixes)}")
    if out.exists():
        raise FileExistsError(f"{out} already exists and is left as it is: give another --out")


def write_safetensors(path: Path, params: Mapping[str, np.ndarray], trained: TrainedModel, *, half: bool) -> None:
    """Writes weights of a model with what describes it; see `export`."""
    about = {
        "config": to_json(trained.config),
        "class_names": trained.class_names,
        "step": trained.step,
        "weights": trained.weights,
        "images_seen": trained.step * trained.config.train.batch_size,
    }
    write_weights(path, params, about, half=half)


def _write_openai(path: Path, params: Mapping[str, np.ndarray], trained: TrainedModel) -> None:
    if "codec" in trained.config:
        raise ValueError("OpenAI's code knows no latents: this model can be exported to a .safetensors file alone")
    check_norm_groups(trained.config.model.norm_groups)
    with atomic_path(path) as temporary:
        write_state_dict(temporary, to_openai(params))
