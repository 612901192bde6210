"""Sample ids to images. Sample (class, i) of a seed is the same image in whatever company it is drawn."""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from fooddiff import parallel
from fooddiff.arrays import Array, Cond, Float, Image, Int, Key, Params, Pixels
from fooddiff.codec import Codec, to_signed
from fooddiff.diffusion.level import Transition
from fooddiff.diffusion.samplers import Descent, Noise, begin
from fooddiff.keys import sample_noise, stream
from fooddiff.xla import jit

BoundSampler: TypeAlias = Callable[[Transition, Descent, Noise, Cond], Descent]
"""A sampler with its denoiser."""
Draw: TypeAlias = Callable[[Params, Key, Int[Array, "n 2"]], Pixels]
"""The compiled sampler: (params, key, ids) -> uint8[n, h, w, 3]."""


def make_draw(
    sampler: Callable[[Params], BoundSampler],
    steps: Transition,
    codec: Codec,
    *,
    cond: Callable[..., Cond],
    mesh: jax.sharding.Mesh,
) -> Draw:
    """Compiles noise to pixels as one program, spread over the devices of a mesh.

    Args:
        sampler: parameters -> the sampler of a denoiser that has them, with its guidance.
        steps: the steps it takes.
        codec: between what is diffused and pixels.
        cond: (key, ids) -> what samples are conditioned on. It may take images as a third argument.
        mesh: devices, with an axis "data".

    Returns:
        (params, key, ids) -> uint8[n, h, w, 3]; ids are (class, index) pairs and n must be a multiple of the number of
        devices. Images u8[n, h', w', 3] as a fourth argument are handed to `cond`.
    """
    batch = parallel.over_data(mesh)
    replicated = parallel.replicated(mesh)

    @partial(jit, out_shardings=replicated)  # every process gets every image
    def draw(params, key, ids, *images):
        ids, *images = jax.lax.with_sharding_constraint((ids, *images), batch)
        descent = begin(_first_noise(key, ids, codec))
        given = cond(key, ids, *map(to_signed, images))
        descent = sampler(params)(steps, descent, _step_noise(key, ids, codec), given)
        return codec.decode(params, descent.x_t)

    return draw


class Stepper(NamedTuple):
    """The compiled steps of a sampler, for somebody who looks on. They end at the images of `make_draw` up to rounding.

    The program knows neither how many steps there are nor the scale of guidance, which are arguments.
    """

    begin: Callable[[Key, Int[Array, "n 2"]], Descent]
    advance: Callable[[Params, Key, Int[Array, "n 2"], Descent, Transition, Float[Array, ""]], Descent]
    """(params, key, ids, descent, the next of the steps, stacked, scale) -> descent."""
    decode: Callable[[Params, Image], Pixels]


def make_stepper(
    sampler: Callable[[Params, Float[Array, ""]], BoundSampler],
    codec: Codec,
    *,
    cond: Callable[..., Cond],
    mesh: jax.sharding.Mesh,
) -> Stepper:
    """Compiles a sampler to be run in parts.

    Args:
        sampler: (parameters, scale of guidance) -> the sampler of a denoiser that has them.
        codec: between what is diffused and pixels.
        cond: (key, ids) -> what samples are conditioned on.
        mesh: devices, with an axis "data", that divide the examples.
    """
    batch = parallel.over_data(mesh)

    @partial(jit, out_shardings=batch)
    def first(key, ids):
        return begin(_first_noise(key, jax.lax.with_sharding_constraint(ids, batch), codec))

    @partial(jit, out_shardings=batch)
    def advance(params, key, ids, descent, steps, scale):
        ids = jax.lax.with_sharding_constraint(ids, batch)
        return sampler(params, scale)(steps, descent, _step_noise(key, ids, codec), cond(key, ids))

    return Stepper(first, advance, jit(codec.decode, out_shardings=parallel.replicated(mesh)))


def _first_noise(key: Key, ids: Int[Array, "n 2"], codec: Codec) -> Image:
    return sample_noise(stream(key, "x_T"), ids, codec.shape)


def _step_noise(key: Key, ids: Int[Array, "n 2"], codec: Codec) -> Noise:
    return lambda remaining: sample_noise(stream(key, "noise", remaining), ids, codec.shape)


def draw_batches(draw: Draw, params: Params, key: Key, ids: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Draws any number of samples with one compiled batch size; see `parallel.in_batches`.

    Args:
        draw: from `make_draw`.
        params: the weights.
        key: the seed's key.
        ids: int[N, 2], (class, index) of every sample.
        batch_size: a multiple of the number of devices.

    Yields:
        uint8[<= batch_size, h, w, c], in the order of `ids`.
    """
    yield from parallel.in_batches(partial(draw, params, key), ids.astype(np.int32), batch_size=batch_size)


def sample_ids(classes: Sequence[int], per_class: int) -> np.ndarray:
    """All (class, index) pairs with index < per_class, class by class: int32[len(classes) * per_class, 2]."""
    return np.array([(y, i) for y in classes for i in range(per_class)], np.int32).reshape(-1, 2)


def npz_bytes(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Encodes samples as an npz: `arr_0`, uint8[n, h, w, 3], and `arr_1`, the class ids."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images, labels)
    return buffer.getvalue()
