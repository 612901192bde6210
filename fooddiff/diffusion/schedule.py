"""Noise schedules and respacing, in float64 NumPy. Owns how betas come about; `discrete` turns them into tables."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

MAX_BETA = 0.999  # IDDPM section 3.2: keeps the last steps of the cosine schedule from being singular


def linear_betas(timesteps: int) -> np.ndarray:
    """The linear schedule of DDPM section 4, rescaled so that any T covers the same range of noise.

    Args:
        timesteps: T >= 2.

    Returns:
        float64[T], beta_t from 0.1/T to 20/T.

    Raises:
        ValueError: T < 2, or so small that a beta reaches 1.
    """
    _check_timesteps(timesteps)
    betas = np.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=np.float64)
    if betas[-1] >= 1:
        raise ValueError(
            f"the linear schedule needs at least 21 timesteps, got {timesteps}: its last beta would be "
            f"{betas[-1]:.3g}, and a beta must be below 1. Use the cosine schedule or more timesteps."
        )
    return betas


def cosine_betas(timesteps: int) -> np.ndarray:
    """The cosine schedule of IDDPM eq. 17, with offset s = 0.008 and betas of at most 0.999.

    Args:
        timesteps: T >= 2.

    Returns:
        float64[T].

    Raises:
        ValueError: T < 2.
    """
    _check_timesteps(timesteps)

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    edges = [alpha_bar(i / timesteps) for i in range(timesteps + 1)]
    return np.array([min(1 - after / before, MAX_BETA) for before, after in pairwise(edges)])


def evenly_spaced(timesteps: int, counts: Sequence[int]) -> list[int]:
    """Chooses which timesteps to keep when T is split into equal sections (IDDPM section 4).

    Args:
        timesteps: T of the original process.
        counts: how many steps to keep in each section: (25,); more than one, as in (10, 15, 5), serve parity. Within a
            section the kept steps are spread evenly and include its first and last step.

    Returns:
        The kept indices, ascending.

    Raises:
        ValueError: a count below 1 or above the number of steps of its section.
    """
    sizes = [timesteps // len(counts) + (i < timesteps % len(counts)) for i in range(len(counts))]
    kept, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        if not 1 <= count <= size:
            raise ValueError(f"cannot keep {count} of the {size} timesteps of a section: expected 1 to {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # summed, not multiplied, so that halves round as in the reference
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def integer_stride(timesteps: int, count: int) -> list[int]:
    """Chooses every k-th timestep from 0 on, the spacing of DDIM section 4.2.

    Serves parity: the reference offers it ("ddim25"), our samplers do not.

    Args:
        timesteps: T of the original process.
        count: how many steps to keep.

    Returns:
        The kept indices, ascending.

    Raises:
        ValueError: no integer stride leaves exactly `count` of T steps.
    """
    for stride in range(1, timesteps):
        if len(range(0, timesteps, stride)) == count:
            return list(range(0, timesteps, stride))
    possible = sorted({len(range(0, timesteps, stride)) for stride in range(1, timesteps)})
    nearest = sorted(possible, key=lambda n: abs(n - count))[:4]
    raise ValueError(
        f"no integer stride keeps exactly {count} of {timesteps} timesteps; "
        f"the nearest possible counts are {sorted(nearest)}"
    )


def nearest(log_snrs: np.ndarray, wanted: np.ndarray) -> list[int]:
    """Chooses as many timesteps as are wanted, each the nearest in log SNR of those that are left.

    Args:
        log_snrs: float[T], descending, of all timesteps.
        wanted: float[S], of which there are no more than T.

    Returns:
        The S kept indices, ascending.
    """
    free = np.array(log_snrs, np.float64)
    kept = []
    for level in wanted:
        kept.append(int(np.abs(free - level).argmin()))
        free[kept[-1]] = np.inf
    return sorted(kept)


def _check_timesteps(timesteps: int) -> None:
    if timesteps < 2:
        raise ValueError(f"a diffusion process needs at least 2 timesteps, got {timesteps}")
