"""Averages of the parameters over training: how much of an average each step keeps."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from fooddiff.arrays import Array, Float, Int

Decay: TypeAlias = Callable[[Int[Array, ""]], Float[Array, ""]]
"""Steps done before this one -> the share of the average that stays."""


def make_averages(rates: Sequence[float], *, warmup: bool, power_lengths: Sequence[float]) -> dict[str, Decay]:
    """The averages of a run by name.

    Args:
        rates: exponential averages, each in [0, 1); their names are the rates, for instance "0.9999".
        warmup: let these keep min(rate, (1 + k) / (10 + k)) at step k, so that early ones forget the initial
            parameters.
        power_lengths: power averages (Karras et al. 2024, arXiv 2312.02696, section 3.1), named "power_<length>": each
            has a width of about this share of the training so far, whatever its length.

    Returns:
        The decay of every average.
    """
    exponential = {str(rate): _exponential(rate, warmup) for rate in rates}
    return exponential | {power_name(length): _power(power_exponent(length)) for length in power_lengths}


def power_name(length: float) -> str:
    """The name of a power average among a state's averages."""
    return f"power_{length}"


def _exponential(rate: float, warmup: bool) -> Decay:
    def decay(step):
        return jnp.minimum(rate, (1 + step) / (10 + step) if warmup else 1.0)

    return decay


def _power(exponent: float) -> Decay:
    def decay(step):
        return (1 - 1 / (step + 1.0)) ** (exponent + 1)

    return decay


def power_exponent(length: float) -> float:
    """The exponent gamma of a power average whose relative standard deviation is `length` (EDM2 eq. 3 and 126).

    Args:
        length: in (0, 0.28); larger ones belong to no average that falls towards the past.

    Returns:
        gamma with length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the largest real root.
    """
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())
