"""A model in one file: weights, config and class names as safetensors. Nothing that the file says is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from fooddiff import processes
from fooddiff.arrays import Params
from fooddiff.files.atomic import write_atomically

FORMAT = 1


class WeightsFile(NamedTuple):
    """What such a file holds."""

    about: Mapping[str, Any]
    """"config" and "class_names" as JSON types, "step", "weights", "images_seen", and "origin" and "codec_origin": what
    the weights and those of the codec were made from, or None."""
    params: dict[str, np.ndarray]  # as stored: float32 or float16


def write_weights(path: Path, params: Params, about: Mapping[str, Any], *, half: bool) -> None:
    """Writes a file that `read_weights` reads.

    Args:
        path: the file to write.
        params: float32 tensors by name, in our layouts (NHWC kernels).
        about: what they are; see `WeightsFile`.
        half: store them as float16, in half the space.
    """
    tensors = {name: np.asarray(value, np.float16 if half else np.float32) for name, value in params.items()}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    texts = {"format": str(FORMAT), **texts}
    # save_file would keep the file from all other users
    write_atomically(path, safetensors.numpy.save(tensors, texts | {"sha256": _hash(texts, tensors)}))


def read_weights(path: Path) -> WeightsFile:
    """Reads a file of `write_weights`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not one of ours, or not what was written; whether its tensors fit its model is not
            checked.
    """
    try:
        with safe_open(path, framework="numpy") as tensors:
            metadata = tensors.metadata()
            params = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (it is no mapping)
        if int(metadata["format"]) > FORMAT:
            raise ValueError(f"it has format {metadata['format']}, this version reads up to {FORMAT}: update fooddiff")
        if metadata.pop("sha256") != _hash(metadata, params):
            raise ValueError("its contents are not those that were written: get the file again")
        about = {name: json.loads(metadata[name]) for name in ("config", "class_names", "step", "images_seen")}
        about |= {name: json.loads(metadata.get(name, "null")) for name in ("origin", "codec_origin")}
        about["step"], about["weights"] = int(about["step"]), metadata["weights"]
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises many types on hostile bytes
        raise ValueError(
            f"{path} was not written by `python -m fooddiff.convert export`, or is not whole: {error}"
        ) from error
    return WeightsFile(about, params)


def _hash(texts: Mapping[str, str], tensors: Params) -> str:
    return processes.sha256_of({"texts": {name: np.array(text) for name, text in texts.items()}, "tensors": tensors})
