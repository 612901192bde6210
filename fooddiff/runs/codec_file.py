"""The codec of a run that diffuses latents: an autoencoder's tensors with the statistics of its latents.

`<workdir>/codec.npz` holds them by their names among the model's parameters (`codec.PREFIX`), so that a run needs
neither the autoencoder's workdir nor data once it has begun. Every checkpoint has their SHA-256.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from fooddiff import processes
from fooddiff.arrays import Params
from fooddiff.files.npz import read_npz, write_npz
from fooddiff.runs.workdir import WorkdirError

NAME = "codec.npz"


def write_codec(workdir: Path, tensors: Params) -> None:
    """Writes a run's codec, if it has one."""
    if tensors:
        write_npz(workdir / NAME, {name: np.asarray(value) for name, value in tensors.items()})


def read_codec(workdir: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Reads a run's codec.

    Args:
        workdir: the run's directory.
        like: names, shapes and dtypes; none for a model without a codec.

    Raises:
        WorkdirError: the file is missing or damaged, or holds another autoencoder than the config says.
    """
    if not like:
        return {}
    path = workdir / NAME
    try:
        tensors = read_npz(path, like.keys())
    except FileNotFoundError as error:
        raise WorkdirError(
            f"{path} is missing: this run diffuses latents, and without their autoencoder nothing can be decoded. It "
            f"was written once, when the run began"
        ) from error
    found, expected = (
        {name: (value.shape, np.dtype(value.dtype)) for name, value in each.items()} for each in (tensors, like)
    )
    if found != expected:
        raise WorkdirError(f"{path} does not hold the tensors of the autoencoder that config.codec describes")
    return tensors


def sha256_of_codec(tensors: Params) -> str | None:
    """What a checkpoint notes of the codec that its model needs; None if it needs none."""
    return processes.sha256_of(tensors) if tensors else None


def check_codec(saved: str | None, tensors: Params, where: Path) -> None:
    """Raises WorkdirError if a checkpoint was saved with another codec than there is now."""
    if saved != (found := sha256_of_codec(tensors)):
        raise WorkdirError(
            f"{where / NAME} is not the codec that the checkpoint was trained with: its SHA-256 is {found}, and "
            f"{saved} in the checkpoint"
        )


def split_codec(params: Params, like: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[Params, Params]:
    """Parts a model's parameters into the network's and the codec's."""
    network = {name: value for name, value in params.items() if name not in like}
    return network, {name: value for name, value in params.items() if name in like}
