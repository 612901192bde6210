"""Batches from the cache to the devices, without a model."""

import tempfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fooddiff import build, parallel
from fooddiff.bench.measure import Quantity, interleaved, quantity, timed
from fooddiff.data.cache import Dataset
from fooddiff.data.feed import device_batches

IMAGES = 20_000
BATCHES = 200


def run(config: ConfigDict, *, repetitions: int) -> dict[str, Quantity]:
    """Times the iterator that training reads, over a cache of random images of the config's size.

    Args:
        config: image and batch size.
        repetitions: rounds that count, of 200 batches each.

    Returns:
        The numbers by name.
    """
    training = build.make_training(config, parallel.make_mesh())
    size, n = config.data.image_size, config.train.batch_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (IMAGES, size, size, 3))
        for rows in np.array_split(np.arange(IMAGES), 20):
            images[rows] = np.random.default_rng(rows[0]).integers(0, 256, (len(rows), size, size, 3), np.uint8)
        labels = np.arange(IMAGES, dtype=np.int32) % 101
        dataset = Dataset(np.load(path, mmap_mode="r"), labels, tuple(map(str, range(101))), {})

        def read(*, flip: bool) -> float:
            batches = device_batches(
                dataset, seed=0, batch_size=n, start_step=0, flip=flip, sharding=training.over_data
            )
            next(batches)
            seconds = timed(lambda: [next(batches) for _ in range(BATCHES)][-1])
            batches.close()
            return seconds

        tasks = {"as stored": lambda: read(flip=False), "half of them mirrored": lambda: read(flip=True)}
        seconds = interleaved(tasks, repetitions)
    return {name: quantity([n * BATCHES / each for each in times], "images/s") for name, times in seconds.items()}
