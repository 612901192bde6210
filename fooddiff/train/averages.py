"""Averages of the parameters over training: how much of an average each step keeps, and others rebuilt from those."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from fooddiff.arrays import Array, Float, Int

MIN_LENGTH, MAX_LENGTH = 0.001, 0.28  # of power averages

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


class PowerAverage(NamedTuple):
    """A power average of the parameters as it was after some step.

    With n steps done it is the mean of the parameters weighted by p(t) = (gamma + 1) t^gamma / n^(gamma + 1), where the
    parameters after step k hold for t in [k - 1, k].
    """

    steps: int  # done, at least 1
    length: float


class Rebuilt(NamedTuple):
    """A power average as a sum of others."""

    coefficients: Float[np.ndarray, " n"]  # of the others; their sum is 1
    error: float  # root mean square of what the weights over time miss, as a share of that of the wanted ones


def rebuild(wanted: PowerAverage, stored: Sequence[PowerAverage]) -> Rebuilt:
    """Finds the sum of stored power averages whose weights over time are nearest to those of a wanted one.

    Least squares over all of time (Karras et al. 2024, arXiv 2312.02696, section 3.2 and appendix C), in float64.
    Unlike there the coefficients sum to 1, so that parameters that stand still are their own average: the plain fit to
    a few averages has a sum as low as 0.7, which would shrink every weight.

    Args:
        wanted: what to rebuild.
        stored: averages of the same run, none of later steps, which know too much.

    Returns:
        The coefficients of the stored averages, and what they miss.
    """
    steps = np.array([average.steps for average in stored], np.float64)
    gammas = np.array([power_exponent(average.length) for average in stored])
    exponent = power_exponent(wanted.length)
    products = _inner_product(steps[:, None], gammas[:, None], steps, gammas)
    target = _inner_product(steps, gammas, wanted.steps, exponent)
    norm = _inner_product(wanted.steps, exponent, wanted.steps, exponent)

    # minimise |sum_i x_i p_i - p|^2 with sum_i x_i = 1 by a Lagrange multiplier; scaled to p_i and p of norm 1
    scale = np.sqrt(norm / products.diagonal())
    system = np.block([[products * np.outer(scale, scale) / norm, scale[:, None]], [scale, np.zeros(1)]])
    coefficients = scale * np.linalg.lstsq(system, np.append(target * scale / norm, 1.0), rcond=None)[0][:-1]
    missed = coefficients @ products @ coefficients - 2 * coefficients @ target + norm
    return Rebuilt(coefficients, float(np.sqrt(max(missed, 0.0) / norm)))


def _inner_product(steps, gamma, other_steps, other_gamma):
    """The integral over t of the product of two weights p."""
    both = np.minimum(steps, other_steps)
    overlap = (both / steps) ** (gamma + 1) * (both / other_steps) ** (other_gamma + 1) / both
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * overlap
