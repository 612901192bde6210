"""Reads the tensors of a torch file without torch, and without running anything that the file says.

A torch file is a pickle plus raw storages. `torch_pickle` reads the former; here every size, stride and offset is
checked against the bytes that are there. Owns both layouts of `torch.save`: the zip archive, and the older
stream of pickles.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from fooddiff.files import torch_pickle
from fooddiff.files.torch_pickle import Loaded, Tensor

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MAX_DIMENSIONS = 64  # of a NumPy array


def load_state_dict(
    path: str | os.PathLike, *, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:  # fmt: skip
    """Reads a state dict as `torch.save` writes it.

    The checkpoint of a whole training has it as its entry "state_dict" (Lightning); nothing else in it is looked at.

    Args:
        path: a file in torch's zip format (since torch 1.6) or in the older stream format.
        wanted: by name, which tensors to read. Of the others, no numbers are brought to memory.

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
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            tensors, storages = read(file, wanted)
            return {name: _array(name, tensor, storages) for name, tensor in tensors.items()}
        except Exception as error:  # hostile bytes make the pickle and zip modules raise nearly every type there is
            raise ValueError(f"{path} is not a state dict of torch.save, or is not whole: {error}") from error


def _read_zip(file: BinaryIO, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """The tensors of `<folder>/data.pkl` and the bytes of their storages `<folder>/data/<key>`."""
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
    tensors = _named_tensors(torch_pickle.load(io.BytesIO(archive.read(pickles[0]))), wanted)
    places = {tensor.storage.key: f"{folder}data/{tensor.storage.key}" for tensor in tensors.values()}
    return tensors, {key: archive.read(name) for key, name in places.items() if name in members}


def _read_legacy(file: BinaryIO, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Five pickles (magic, version, platform, object, storage keys), then each storage after its length."""
    file.seek(0)
    parts = []
    for _ in range(5):
        parts.append(torch_pickle.load(file))
        _state(parts[-1])  # says what is foreign before what follows is read
    magic, version, platform, state, keys = parts
    magic, version, platform, keys = (loaded.value for loaded in (magic, version, platform, keys))
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION) or not platform["little_endian"]:
        raise ValueError(
            "it has neither a zip archive's end nor the magic number of torch's older little-endian format"
        )
    tensors, storages = _named_tensors(state, wanted), {}
    needed = {tensor.storage.key for tensor in tensors.values()}
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(f"a storage is named by a {type(key).__name__}, expected a string")
        (numel,) = struct.unpack("<q", file.read(8))
        left = os.fstat(file.fileno()).st_size - file.tell()
        length = numel * state.storages[key].dtype.itemsize
        if not 0 <= length <= left:
            raise ValueError(f"storage {key!a} should have {numel} numbers, but only {left} bytes are left: truncated")
        if key in needed:
            storages[key] = file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)
    return tensors, storages


def _state(loaded: Loaded) -> Any:
    """What a pickle holds or, of a training's checkpoint, which may name other things, too, its state dict."""
    state = loaded.value
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        return state["state_dict"]
    if loaded.foreign:
        raise ValueError(
            f"it names {loaded.foreign[0]}, which no state dict needs, and which was not run: this may be an attack, "
            f"or a whole model instead of its state dict"
        )
    return state


def _named_tensors(loaded: Loaded, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of a state dict."""
    state = _state(loaded)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, expected a dict of tensors by name")
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"it has an entry whose name is a {type(name).__name__}, expected a tensor with a name")
        if not isinstance(value, Tensor):
            raise ValueError(f"its entry {name!a} is a {type(value).__name__}, expected a tensor")
    return {name: tensor for name, tensor in state.items() if wanted(name)}


def _array(name: str, tensor: Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    """The tensor as an array, if every one of its elements lies inside its storage."""
    (key, dtype, numel), offset, size, stride = tensor
    content = storages.get(key)
    if content is None or len(content) != numel * dtype.itemsize:
        raise ValueError(f"{name!a} needs {numel} {dtype} of storage {key!a}, which has {len(content or b'')} bytes")
    if not len(size) == len(stride) <= _MAX_DIMENSIONS or any(
        type(x) is not int or x < 0 for x in (offset, *size, *stride)
    ):
        raise ValueError(
            f"{name!a} has an offset, size or stride that is not made of integers >= 0, as many for the size as for "
            f"the stride, and at most {_MAX_DIMENSIONS}"
        )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > numel or (math.prod(size) and last >= numel):
        raise ValueError(f"{name!a} of size {size} at offset {offset} reaches outside its storage of {numel} numbers")
    if not math.prod(size):
        return np.empty(size, dtype)
    flat = np.frombuffer(content, dtype)[offset:]
    strides = [step * dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)
