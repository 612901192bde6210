"""Reads tensors of a safetensors file that may come from anybody."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open


def read_tensors(path: Path, *, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """Reads those tensors of a file whose names are wanted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or not whole.
    """
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys() if wanted(name)}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises many types on hostile bytes
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
