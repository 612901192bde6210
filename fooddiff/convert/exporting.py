"""Checkpoints to files and folders that other programs read, each with a model card."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fooddiff import parallel
from fooddiff.convert import diffusers, stablehlo
from fooddiff.convert.card import model_card, terms_of
from fooddiff.files.atomic import atomic_folder, atomic_path, write_atomically
from fooddiff.files.torch_zip import write_state_dict
from fooddiff.model.openai import check_is_openais, to_openai
from fooddiff.runs.load import TrainedModel, load_trained
from fooddiff.runs.weights_file import write_weights
from fooddiff.runs.workdir import to_json

log = logging.getLogger(__name__)

PLACES = {
    "data.path": None, "data.cache_dir": "data/cache", "eval.cache_dir": "data/cache", "eval.path": None,
    "eval.inception": None, "codec.path": None, "perceptual.path": None, "init_from": None,
}  # fmt: skip
"""Fields that name files of the machine that trained, with what an export says instead."""


class Format(NamedTuple):
    """A form that a model may leave in."""

    suffix: str  # of the file; none for a folder
    library: str  # that loads it, as Hugging Face's hub names it
    write: Callable[[Path, Mapping[str, np.ndarray], TrainedModel], str]
    """(the file to write or an empty folder, float32 weights by our names, what they belong to) -> how to use them, as
    Python source."""


def export(
    workdir: Path, *, step: int | None, weights: str, out: Path, format: str | None = None, half: bool = False
) -> None:
    """Writes the weights of a checkpoint to a new file or folder, with a model card and without `PLACES`.

    A `.safetensors` file has our parameter names and layouts (NHWC kernels) and, as metadata, "config" and
    "class_names" (JSON), "step", "images_seen", "weights", "origin", "codec_origin" and "licence"; `fooddiff.load` and
    every --workdir take it. A `.pt` file is a state dict with OpenAI's names and torch's layouts. Both are float32, bit
    for bit the checkpoint's, unless halved. For the folders see `diffusers.write_folder` and `stablehlo.write_folder`.
    The card of a folder is its README.md; that of a file lies beside it, under its name and `.md`.

    Args:
        workdir: a run's directory, or a file of weights.
        step: which checkpoint; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        out: the file or folder to write.
        format: of `FORMATS`; None takes what the suffix of `out` says.
        half: store a `.safetensors` file as float16.

    Raises:
        FileNotFoundError: no such workdir or checkpoint.
        FileExistsError: there already is a file of that name.
        ValueError: another suffix, no such weights, or a model that the format cannot hold.
    """
    by_suffix = {each.suffix: name for name, each in FORMATS.items() if each.suffix}
    if format is None:
        check_suffix(out, by_suffix)
        format = by_suffix[out.suffix]
    chosen = FORMATS[format]
    if chosen.suffix:
        check_suffix(out, (chosen.suffix,))
    if half and format != "safetensors":
        raise ValueError(f"--half is for .safetensors files, and the format is {format}")
    card = out.with_name(f"{out.name}.md") if chosen.suffix else out / "README.md"
    check_new(out)
    check_new(card)
    trained = load_trained(workdir, step=step, weights=weights, mesh=parallel.make_mesh(), task=None)
    trained = trained._replace(config=without_places(trained.config))
    params = {name: np.asarray(value) for name, value in trained.params.items()}
    write = partial(chosen.write, half=True) if half else chosen.write
    describe = partial(model_card, trained, name=out.stem, library=chosen.library, workdir=workdir)
    if chosen.suffix:
        write_atomically(card, describe(use=write(out, params, trained)).encode())
    else:
        with atomic_folder(out) as folder:
            use = write(folder, params, trained).replace("FOLDER", json.dumps(out.name))
            (folder / card.name).write_text(describe(use=use), encoding="utf-8")
    log.info("wrote %s: step %d, weights %s, %d tensors", out, trained.step, trained.weights, len(params))


def without_places(config: ConfigDict) -> ConfigDict:
    """The config without `PLACES`."""
    changed = ConfigDict(to_json(config))
    for field, value in PLACES.items():
        *sections, name = field.split(".")
        section = changed
        for each in sections:
            section = section.get(each, ConfigDict())
        if name in section:
            section[name] = value
    return changed


def check_suffix(out: Path, suffixes: Iterable[str]) -> None:
    """Raises unless the name of `out` has one of the suffixes."""
    if out.suffix not in suffixes:
        raise ValueError(f"--out is {out}, expected a name that ends in {' or '.join(suffixes)}")


def check_new(out: Path) -> None:
    """Raises unless there is nothing at `out`."""
    if out.exists():
        raise FileExistsError(f"{out} already exists and is left as it is: give another --out")


def write_safetensors(
    path: Path, params: Mapping[str, np.ndarray], trained: TrainedModel, *, half: bool = False
) -> str:
    """Writes weights of a model with what describes it; see `export`."""
    about = {
        "config": to_json(trained.config),
        "class_names": trained.class_names,
        "step": trained.step,
        "weights": trained.weights,
        "images_seen": trained.images_seen,
        "origin": _without_workdirs(trained.meta.get("origin")),
        "codec_origin": _without_workdirs(trained.meta.get("codec_origin")),
        "licence": terms_of(trained),
    }
    write_weights(path, params, about, half=half)
    return f"""import fooddiff\n\nimages = fooddiff.load("{path.name}").sample(per_class=1)"""


def _without_workdirs(origin: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if origin is None:
        return None
    kept = {name: value for name, value in origin.items() if name != "workdir"}
    return kept | ({"origin": _without_workdirs(kept["origin"])} if "origin" in kept else {})


def _write_openai(path: Path, params: Mapping[str, np.ndarray], trained: TrainedModel) -> str:
    if "codec" in trained.config:
        raise ValueError("OpenAI's code knows no latents: this model can be exported to a .safetensors file alone")
    check_is_openais(trained.config.model)
    with atomic_path(path) as temporary:
        write_state_dict(temporary, to_openai(params))
    return f"""import torch\n\nstate_dict = torch.load("{path.name}", weights_only=True)"""


FORMATS = {
    "safetensors": Format(".safetensors", "fooddiff", write_safetensors),
    "openai": Format(".pt", "guided-diffusion", _write_openai),
    "diffusers": Format("", "diffusers", diffusers.write_folder),
    "stablehlo": Format("", "jax", stablehlo.write_folder),
}
