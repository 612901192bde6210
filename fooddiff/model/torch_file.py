"""Reads the tensors of a torch file without torch, and without running anything that the file says.

A torch file is a pickle plus raw storages. A pickle is a program: here it may name the few classes that a
state dict is made of, each of which is replaced by a harmless stand-in, and every size, stride and offset is
checked against the bytes that are there. Owns both layouts of `torch.save`: the zip archive, and the older
stream of pickles.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


def load_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a state dict as `torch.save` writes it.

    Args:
        path: a file in torch's zip format (since torch 1.6) or in the older stream format.

    Returns:
        Parameter name -> read-only view of the file's numbers, in the file's order and dtypes (bfloat16 is
        that of `jax.numpy`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file names anything but the parts of a state dict, so it could run code; or it is
            truncated, inconsistent, or holds something other than tensors by name.
    """
    with open(path, "rb") as file:
        try:
            state, storages = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
            return {name: _array(name, tensor, storages) for name, tensor in _named_tensors(state)}
        except Exception as error:  # hostile bytes make the pickle and zip modules raise nearly every type there is
            raise ValueError(f"{path} is not a state dict of torch.save, or is not whole: {error}") from error


class _Storage(NamedTuple):
    """A reference to raw numbers elsewhere in the file."""

    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    """A strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _StateDict(dict):
    """Stands in for OrderedDict; drops the attribute `_metadata` that torch hangs on it."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the pickled attributes."""


class _StorageType(NamedTuple):
    """Stands in for a class such as torch.FloatStorage."""

    name: str


class _Function(NamedTuple):
    """A function that a pickle may call; a tuple, so that a pickle cannot set attributes on it."""

    call: Callable

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, backward_hooks=None, metadata=None) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor is not described by a storage, an offset, a size and a stride")
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(data, requires_grad=True, backward_hooks=None) -> _Tensor:
    return data


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _StateDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    **{("torch", name): _StorageType(name) for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Resolves the names in `_GLOBALS` and refuses every other by name."""

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global that the pickle names; nothing is imported."""
        if (module, name) not in _GLOBALS:
            raise ValueError(
                f"it names {module!a}.{name!a}, which no state dict needs, and which was not run: this may "
                "be an attack, or a whole model instead of its state dict"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Called for every reference to a storage."""
        kind, storage_type, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(part is not None for part in view):
            raise ValueError("it refers to storages in an unknown way")
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise ValueError(f"storage {key!a} has no valid size")
        return _Storage(key, _DTYPES[storage_type.name], numel)


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
    """The object of `<folder>/data.pkl` and the bytes of each storage `<folder>/data/<key>`."""
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    available = os.fstat(file.fileno()).st_size
    if sum(info.file_size for info in members.values()) > available:
        raise ValueError("its members are compressed or overlap, which torch.save never writes")
    pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"the zip archive holds {len(pickles)} files data.pkl, expected one")
    folder = pickles[0].removesuffix("data.pkl")
    byteorder = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in members else b"little"
    if byteorder != b"little":
        raise ValueError(f"its byte order is {byteorder[:10]!a}, expected little")
    state = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
    prefix = f"{folder}data/"
    return state, {name.removeprefix(prefix): archive.read(name) for name in members if name.startswith(prefix)}


def _read_legacy(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
    """Five pickles (magic, version, platform, object, storage keys), then each storage after its length."""
    file.seek(0)
    magic, version, platform, state, keys = (_Unpickler(file).load() for _ in range(5))
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION) or not platform["little_endian"]:
        raise ValueError(
            "it has neither a zip archive's end nor the magic number of torch's older little-endian format"
        )
    sizes = {tensor.storage.key: tensor.storage.dtype.itemsize for _, tensor in _named_tensors(state)}
    storages = {}
    for key in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        left = os.fstat(file.fileno()).st_size - file.tell()
        if not 0 <= numel * sizes[key] <= left:
            raise ValueError(f"storage {key!a} should have {numel} numbers, but only {left} bytes are left: truncated")
        storages[key] = file.read(numel * sizes[key])
    return state, storages


def _named_tensors(state: Any) -> list[tuple[str, _Tensor]]:
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__.strip('_')}, expected a dict of tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ValueError(
                f"its entry {name!a} is a {type(value).__name__.strip('_')}, expected a tensor with a name"
            )
    return list(state.items())


def _array(name: str, tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    """The tensor as an array, if every one of its elements lies inside its storage."""
    (key, dtype, numel), offset, size, stride = tensor
    content = storages.get(key)
    if content is None or len(content) != numel * dtype.itemsize:
        raise ValueError(f"{name!a} needs {numel} {dtype} of storage {key!a}, which has {len(content or b'')} bytes")
    if len(size) != len(stride) or any(type(x) is not int or x < 0 for x in (offset, *size, *stride)):
        raise ValueError(f"{name!a} has offset {offset!a}, size {size!a}, stride {stride!a}: expected integers >= 0")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > numel or (math.prod(size) and last >= numel):
        raise ValueError(f"{name!a} of size {size} at offset {offset} reaches outside its storage of {numel} numbers")
    if not math.prod(size):
        return np.empty(size, dtype)
    flat = np.frombuffer(content, dtype)[offset:]
    strides = [step * dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)
