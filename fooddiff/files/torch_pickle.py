"""Builds what the pickle of a torch state dict describes, without Python's unpickler.

A pickle is a program. This module interprets the instructions that state dicts are made of and refuses all others by
name. It neither imports nor runs anything that a pickle names: for all but the parts of a state dict stands a
`Foreign`, and the caller learns of it. Python's own unpickler would not do, even one that refuses all names: nine bytes
make it fill the memory with its memo, and a dict key of nested tuples that share their halves is hashed forever. Here
time and memory are bounded by the length of the pickle, since the memo is a dict and the keys of dicts are strings,
numbers or `Foreign`. Owns no file layout.
"""

import pickletools
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

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


class Storage(NamedTuple):
    """A reference to raw numbers elsewhere in the file."""

    key: str
    dtype: np.dtype
    numel: int


class Tensor(NamedTuple):
    """A strided view of a storage, in elements. None of its numbers is checked yet."""

    storage: Storage
    offset: Any
    size: tuple[Any, ...]
    stride: tuple[Any, ...]


class Foreign:
    """Stands for something that a pickle names, and for whatever it would do with that: nothing."""

    def __call__(self, *arguments: Any) -> "Foreign":
        """Itself."""
        return self

    def extend(self, items: Sequence[Any]) -> None:
        """Forgets items that would be added."""

    update = extend


class Loaded(NamedTuple):
    """What a pickle describes."""

    value: Any  # `Tensor`s, `Storage`s and `Foreign`s in dicts, lists and tuples, and plain numbers and strings
    foreign: list[str]  # the names of what no state dict needs
    storages: dict[str, Storage]  # all that it refers to, by key


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, backward_hooks=None, metadata=None) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor is not described by a storage, an offset, a size and a stride")
    return Tensor(storage, offset, size, stride)


def _rebuild_parameter(data, requires_grad=True, backward_hooks=None) -> Any:
    return data


def _ordered_dict() -> dict[str, Any]:
    return {}


_GLOBALS: dict[tuple[str, str], Callable | np.dtype] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


def load(file: BinaryIO) -> Loaded:
    """Reads one pickle, from where the file stands to the pickle's end.

    Raises:
        ValueError: the pickle has an instruction that no state dict and no training's checkpoint needs.
        Exception: it is damaged; of many types.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    foreign: list[str] = []
    storages: dict[str, Storage] = {}

    def named(module: Any, name: Any) -> Callable | np.dtype:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it names something otherwise than by strings")
        if (module, name) not in _GLOBALS:
            foreign.append(f"{module!a}.{name!a}")
            return Foreign()
        return _GLOBALS[module, name]

    def pop_from(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return Loaded(stack.pop(), foreign, storages)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop_from(-int(opcode.name[-1]))))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_from(marks.pop())))
            case "APPEND" | "APPENDS":
                items = pop_from(-1 if opcode.name == "APPEND" else marks.pop())
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop_from(-2 if opcode.name == "SETITEM" else marks.pop())
                stack[-1].update(_entries(items))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(named(*pop_from(-2)))
            case "BINPERSID":
                stack.append(storage := _storage(stack.pop()))
                storages[storage.key] = storage
            case "REDUCE":
                function, arguments = pop_from(-2)
                stack.append(function(*arguments))
            case "NEWOBJ":
                kind, _ = pop_from(-2)
                if not isinstance(kind, Foreign):
                    raise ValueError(f"it makes an object of a {type(kind).__name__}")
                stack.append(kind)
            case "BUILD":  # sets attributes, such as the _metadata that torch hangs on a state dict
                stack.pop()
            case name:
                raise ValueError(
                    f"its pickle has the instruction {name}, which no state dict needs: this may be an attack"
                )
    raise ValueError("its pickle has no end")


def _entries(items: Sequence[Any]) -> dict[str | int | Foreign, Any]:
    """The entries of a dict from its keys and values in turn; a key must be of a type that takes no time to hash."""
    if wrong := [type(key).__name__ for key in items[::2] if not isinstance(key, str | int | Foreign)]:
        raise ValueError(f"it has an entry whose name is a {wrong[0]}, expected a tensor with a name")
    return dict(zip(items[::2], items[1::2], strict=True))


def _storage(reference: Any) -> Storage:
    """Resolves the tuple ("storage", type, key, place, numel), to which older versions add a None."""
    kind, dtype, key, _, numel, *view = reference
    if kind != "storage" or not isinstance(dtype, np.dtype) or any(part is not None for part in view):
        raise ValueError("it refers to storages in an unknown way")
    if not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise ValueError("it refers to a storage without a valid name and size")
    return Storage(key, dtype, numel)
