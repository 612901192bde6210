"""Batches on the devices before the step asks for them. Owns the thread that prefetches, not the order."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from fooddiff.arrays import Batch
from fooddiff.data.ahead import ahead
from fooddiff.data.cache import Dataset
from fooddiff.data.latents import Latents
from fooddiff.data.order import batch_order


def device_batches(
    dataset: Dataset | Latents,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    flip: bool,
    sharding: jax.sharding.NamedSharding,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Yields the global batches of steps start_step, start_step + 1, ... for ever.

    Every process calls this with the same arguments and reads only the rows of its own devices. A background
    thread keeps `prefetch` batches ready on the devices; what it raises is raised here, at the batch that
    failed. Close the iterator to end the thread.

    Args:
        dataset: images, or latents, and labels.
        seed: the run's data seed, >= 0.
        batch_size: images per global batch, a multiple of the shards of the batch axis.
        start_step: the step of the first batch, >= 0.
        flip: mirror a random half of the images left to right.
        sharding: splits the first axis, for instance P("data"), and no other.
        prefetch: batches that wait on the devices, >= 1.

    Returns:
        An endless iterator of Batch(pixels u8[n, h, w, 3] or latents f32[n, h, w, c], {"y": i32[n]}); batch k
        depends only on (seed, start_step + k).

    Raises:
        ValueError: the devices cannot divide the batch, or a number is out of range.
    """
    if start_step < 0 or prefetch < 1:
        raise ValueError(f"expected start_step >= 0 and prefetch >= 1, got {start_step} and {prefetch}")
    try:
        sharding.shard_shape((batch_size,))
    except ValueError as error:
        raise ValueError(
            f"a batch of {batch_size} images cannot be divided evenly among the devices of "
            f"{dict(sharding.mesh.shape)} with {sharding.spec}; choose a batch size that is a multiple of "
            f"the number of devices"
        ) from error

    def make(step: int) -> Batch:
        indices, mirrored = batch_order(seed, step, num_examples=len(dataset.images), batch_size=batch_size)
        mirrored = mirrored & flip

        def pixels(index: tuple[slice, ...]) -> np.ndarray:
            return dataset.take(indices[index[0]], mirrored[index[0]])

        def labels(index: tuple[slice, ...]) -> np.ndarray:
            return dataset.labels[indices[index[0]]]

        with jax.transfer_guard_host_to_device("allow"):  # the one transfer of the loop that is meant
            batch = Batch(
                pixels=jax.make_array_from_callback((batch_size, *dataset.example_shape), sharding, pixels),
                cond={"y": jax.make_array_from_callback((batch_size,), sharding, labels)},
            )
        return jax.block_until_ready(batch)

    return _prefetched(make, start_step, prefetch)


def _prefetched(make: Callable[[int], Batch], start_step: int, prefetch: int) -> Iterator[Batch]:
    """Yields make(start_step), make(start_step + 1), ..., computed `prefetch` calls ahead in one thread."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    try:
        for batch in ahead((pool.submit(make, step) for step in itertools.count(start_step)), prefetch):
            yield batch.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
