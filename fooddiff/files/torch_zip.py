"""Writes a state dict in the zip format of `torch.save`, without torch. The reader is `torch_file`."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_state_dict(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes float32 arrays so that `torch.load(path, weights_only=True)` gives tensors by name, bit for bit.

    Args:
        path: the file to create or replace.
        state_dict: float32 arrays of any layout by name; each gets a storage of its own, in C order.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # dated 1980: equal weights, equal files

        write("data.pkl", _pickled(state_dict))
        write("byteorder", b"little")
        for key, value in enumerate(state_dict.values()):
            write(f"data/{key}", value.astype("<f4", casting="equiv").tobytes())
        write("version", b"3\n")


def _pickled(state_dict: Mapping[str, np.ndarray]) -> bytes:
    """The pickle of {name: tensor}, with references to the storages "0", "1", ....

    Its opcodes are put together here because `pickle.Pickler` imports what it names, and torch is not installed.
    """
    items = [_plain(name) + _tensor(str(key), value.shape) for key, (name, value) in enumerate(state_dict.items())]
    return b"".join([pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK, *items, pickle.SETITEMS, pickle.STOP])


def _tensor(key: str, shape: tuple[int, ...]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)."""
    numel = int(np.prod(shape))
    storage = _tuple(_plain("storage"), _name("torch", "FloatStorage"), _plain(key), _plain("cpu"), _plain(numel))
    strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    no_hooks = _call(_name("collections", "OrderedDict"))
    return _call(
        _name("torch._utils", "_rebuild_tensor_v2"),
        storage + pickle.BINPERSID, _plain(0), _plain(shape), _plain(strides), _plain(False), no_hooks,
    )  # fmt: skip


def _plain(value: str | int | bool | tuple[int, ...]) -> bytes:
    """A value of Python's own types, without the pickle's first two bytes and its last."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"".join([pickle.MARK, *items, pickle.TUPLE])


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + _tuple(*arguments) + pickle.REDUCE
