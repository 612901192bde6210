"""How arrays lie on the devices: whole on each, divided by examples, or divided by parameters (ZeRO).

Owns batches that the devices can divide, of examples of any number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from fooddiff.arrays import Array, Params, PyTree

State = TypeVar("State")


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices in a row, with the axis "data"; all of every process where None."""
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
    """The first axis, of examples, divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def divided(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The longest axis that can be divided evenly among the devices; an array without one is replicated."""
    longest = max((size for size in shape if size % mesh.size == 0), default=None)
    axes = () if longest is None else (None,) * shape.index(longest) + ("data",)
    return NamedSharding(mesh, PartitionSpec(*axes))


def shard(abstract: State, mesh: Mesh, parts: Sequence[str]) -> State:
    """Says where each leaf of a state lies.

    Args:
        abstract: a dataclass of shapes.
        mesh: devices, with an axis "data".
        parts: fields of the state whose leaves are divided among the devices (ZeRO, Rajbhandari et al. 2020). The rest
            is replicated.

    Returns:
        A sharding for every leaf.
    """
    whole = jax.tree.map(lambda _: replicated(mesh), abstract)
    return replace(
        whole, **{part: jax.tree.map(lambda leaf: divided(mesh, leaf.shape), getattr(abstract, part)) for part in parts}
    )


def gathering(loss: Callable[..., Any], whole: NamedSharding) -> Callable[..., Any]:
    """A loss that brings divided parameters, its first argument, together before it uses them.

    Their gradient is whole, too. Left to itself, XLA divides the convolutions as it finds parameters or moments
    divided: in loops, and with more memory instead of less.
    """

    def gathered(params: Params, *rest: Any) -> Any:
        return loss(jax.lax.with_sharding_constraint(params, whole), *rest)

    return gathered


def with_sharding(abstract: PyTree, sharding: Sharding) -> PyTree:
    """Adds a sharding to the output of `jax.eval_shape`, which drops it."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)


def divisible(batch_size: int, mesh: Mesh) -> int:
    """A batch size rounded up to a multiple of the number of devices."""
    return batch_size + -batch_size % mesh.size


def in_batches(function: Callable[..., PyTree], *arrays: Array, batch_size: int) -> Iterator[PyTree]:
    """Applies a compiled function to any number of examples at one batch size; the last batch is padded and cut.

    Args:
        function: takes `batch_size` entries of each array, and gives arrays with as many.
        *arrays: of one length.
        batch_size: a multiple of the number of devices.

    Yields:
        What the function gives for up to `batch_size` entries, on the host, in order.
    """
    for start in range(0, len(arrays[0]), batch_size):
        chunks = [np.asarray(array[start : start + batch_size]) for array in arrays]
        given = function(*(np.resize(chunk, (batch_size, *chunk.shape[1:])) for chunk in chunks))
        n = len(chunks[0])
        yield jax.tree.map(lambda leaf, n=n: np.asarray(leaf)[:n], given)
