"""Sample ids to images. Sample (class, i) of a seed is the same image in whatever company it is drawn."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import jax
import numpy as np

from fooddiff import parallel
from fooddiff.arrays import Array, Cond, Image, Int, Key, Params, Pixels
from fooddiff.codec import Codec
from fooddiff.diffusion.level import Transition
from fooddiff.diffusion.samplers import Noise
from fooddiff.keys import sample_noise, stream
from fooddiff.xla import jit

Draw: TypeAlias = Callable[[Params, Key, Int[Array, "n 2"]], Pixels]
"""The compiled sampler: (params, key, ids) -> uint8[n, h, w, 3]."""


def make_draw(
    sampler: Callable[[Params], Callable[[Transition, Image, Noise, Cond], Image]],
    steps: Transition,
    codec: Codec,
    *,
    conditional: bool,
    mesh: jax.sharding.Mesh,
) -> Draw:
    """Compiles noise to pixels as one program, spread over the devices of a mesh.

    Args:
        sampler: parameters -> the sampler of a denoiser that has them, with its guidance.
        steps: the steps it takes.
        codec: between what is diffused and pixels.
        conditional: whether the denoiser is to know the class.
        mesh: devices, with an axis "data".

    Returns:
        (params, key, ids) -> uint8[n, h, w, 3]; ids are (class, index) pairs and n must be a multiple of the number of
        devices.
    """
    batch = parallel.over_data(mesh)
    replicated = parallel.replicated(mesh)

    @partial(jit, out_shardings=replicated)  # every process gets every image
    def draw(params, key, ids):
        ids = jax.lax.with_sharding_constraint(ids, batch)
        cond: Cond = {"y": ids[:, 0]} if conditional else {}
        x_0 = sampler(params)(
            steps,
            sample_noise(stream(key, "x_T"), ids, codec.shape),
            lambda remaining: sample_noise(stream(key, "noise", remaining), ids, codec.shape),
            cond,
        )
        return codec.decode(params, x_0)

    return draw


def draw_batches(draw: Draw, params: Params, key: Key, ids: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Draws any number of samples with one compiled batch size; the last batch is padded and cut.

    Args:
        draw: from `make_draw`.
        params: the weights.
        key: the seed's key.
        ids: int[N, 2], (class, index) of every sample.
        batch_size: a multiple of the number of devices.

    Yields:
        uint8[<= batch_size, h, w, c], in the order of `ids`.
    """
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        padded = np.resize(chunk, (batch_size, 2)).astype(np.int32)
        yield np.asarray(draw(params, key, padded))[: len(chunk)]


def sample_ids(classes: Sequence[int], per_class: int) -> np.ndarray:
    """All (class, index) pairs with index < per_class, class by class: int32[len(classes) * per_class, 2]."""
    return np.array([(y, i) for y in classes for i in range(per_class)], np.int32).reshape(-1, 2)
