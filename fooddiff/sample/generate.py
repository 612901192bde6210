"""Sample ids to images. Sample (class, i) of a seed is the same image in whatever company it is drawn."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from fooddiff.arrays import Array, Int, Key, Label, Params, Pixels
from fooddiff.diffusion.process import GaussianDiffusion
from fooddiff.diffusion.reverse import Parameterization
from fooddiff.diffusion.samplers import MultistepFn, sample
from fooddiff.keys import sample_noise, stream
from fooddiff.model.network import Network
from fooddiff.sample.pixels import to_uint8
from fooddiff.xla import jit

Generator = Callable[[Params, Key, Int[Array, "n 2"]], Pixels]


def make_generator(
    network: Network,
    process: GaussianDiffusion,
    param: Parameterization,
    step: MultistepFn,
    image_shape: tuple[int, int, int],
    *,
    conditional: bool,
    mesh: jax.sharding.Mesh,
) -> Generator:
    """Compiles noise to pixels as one program, spread over the devices of a mesh.

    Args:
        network: the denoiser.
        process: the process, respaced for fewer steps.
        param: what the network predicts.
        step: the sampler's update.
        image_shape: (h, w, c).
        conditional: whether the network sees labels.
        mesh: devices, with an axis "data".

    Returns:
        (params, key, ids) -> uint8[n, h, w, c]; ids are (class, index) pairs and n must be a multiple of the number of
        devices.
    """
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    @partial(jit, out_shardings=replicated)  # every process gets every image
    def generate(params, key, ids):
        ids = jax.lax.with_sharding_constraint(ids, batch)
        y: Label | None = ids[:, 0] if conditional else None
        x_0 = sample(
            step,
            process,
            param,
            partial(network.apply, params),
            sample_noise(stream(key, "x_T"), ids, image_shape),
            lambda t: sample_noise(stream(key, "noise", t), ids, image_shape),
            y,
        )
        return to_uint8(x_0)

    return generate


def generate_batches(
    generator: Generator, params: Params, key: Key, ids: np.ndarray, batch_size: int
) -> Iterator[np.ndarray]:
    """Generates any number of samples with one compiled batch size; the last batch is padded and cut.

    Args:
        generator: from `make_generator`.
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
        yield np.asarray(generator(params, key, padded))[: len(chunk)]


def sample_ids(classes: Sequence[int], per_class: int) -> np.ndarray:
    """All (class, index) pairs with index < per_class, class by class: int32[len(classes) * per_class, 2]."""
    return np.array([(y, i) for y in classes for i in range(per_class)], np.int32).reshape(-1, 2)
