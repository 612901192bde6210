"""Which images a training step sees: a pure function of (seed, step). Owns no data and no state.

All epochs laid end to end are one endless line of positions; step s takes the positions [s * batch_size, (s +
1) * batch_size). A run therefore resumes from its step alone, and the line does not depend on the batch size
or the number of processes.
"""

from functools import lru_cache

import numpy as np


def batch_order(seed: int, step: int, *, num_examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives the images of one global batch and which of them to mirror.

    Position p = step * batch_size + i belongs to epoch p // num_examples and holds the image
    permutation(seed, epoch)[p % num_examples]. A batch may span epochs; every epoch holds each image once.

    Args:
        seed: the run's data seed, >= 0.
        step: optimizer step, >= 0.
        num_examples: images in the data set, >= 1.
        batch_size: images in the global batch, >= 1.

    Returns:
        (indices i64[batch_size], flip bool[batch_size]).

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("step", step, 0),
        ("num_examples", num_examples, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; expected an integer >= {least}")
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty(batch_size, np.int64)
    flip = np.empty(batch_size, bool)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        permutation, mirrored = _epoch(seed, int(epoch), num_examples)
        indices[here] = permutation[offsets[here]]
        flip[here] = mirrored[offsets[here]]
    return indices, flip


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws (permutation, flips) of one epoch.

    Only the raw words of a bit generator are used: NumPy keeps those the same for ever, which it does not
    promise for `Generator.permutation`, and a run must resume on a newer NumPy.
    """
    order, coins = (
        np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, purpose))).random_raw(num_examples)
        for purpose in (0, 1)
    )
    return np.argsort(order, kind="stable"), coins >> np.uint64(63) == 1
