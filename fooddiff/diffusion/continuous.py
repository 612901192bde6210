"""Continuous-time variance-preserving diffusion: levels of any log SNR, their density in training, grids for sampling.

The network's time is the log SNR itself.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fooddiff.arrays import Array, Float, Key, PerExample
from fooddiff.diffusion.level import Level, Transition, clean_level

MAX_LOG_SNR = 15.0  # training stays within -15 and 15, where a level is its limit but for float32's rounding
RHO = 7.0  # EDM eq. 5
SMALLEST_LOG_VAR = -40.0  # of the last step, whose variance is 0

LogSnrOf = Callable[[Float[Array, " n"]], Float[Array, " n"]]
Density = Callable[[Key, int], PerExample]  # (key, n) -> log SNR of n training examples


def level_of(log_snr: Float[Array, " n"]) -> Level:
    """The level of a log SNR, each field computed without cancellation."""
    return Level(
        alpha=jnp.sqrt(jax.nn.sigmoid(log_snr)),
        sigma=jnp.sqrt(jax.nn.sigmoid(-log_snr)),
        inv_alpha=jnp.sqrt(1 + jnp.exp(-log_snr)),
        noise_to_signal=jnp.exp(-log_snr / 2),
        log_snr=log_snr,
        network_time=log_snr,
    )


def transitions(log_snrs: np.ndarray) -> Transition:
    """The steps of a reverse process along given levels; the last one leads to x_0.

    Args:
        log_snrs: float64[S], ascending, S >= 1.

    Returns:
        S steps, computed in float64 and cast once.
    """
    here, after = log_snrs, np.append(log_snrs[1:], np.inf)
    alpha_next, var_next = np.sqrt(_sigmoid(after)), _sigmoid(-after)
    shrink = np.exp(here - after)  # SNR / SNR_next
    coef_xt = np.sqrt(_sigmoid(here) / _sigmoid(after)) * var_next / _sigmoid(-here)
    with np.errstate(divide="ignore"):
        log_var = np.maximum(np.log(var_next * -np.expm1(here - after)), SMALLEST_LOG_VAR)
    level = level_of(jnp.asarray(here, jnp.float32))
    following = jax.tree.map(lambda fields, clean: jnp.append(fields[1:], clean), level, clean_level())
    numbers = (alpha_next * (1 - shrink), coef_xt, log_var)
    return Transition(
        level,
        following,
        *(jnp.asarray(number, jnp.float32) for number in numbers),
        remaining=jnp.arange(len(here), dtype=jnp.int32)[::-1],
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def cosine_log_snr(u: Float[Array, " n"]) -> Float[Array, " n"]:
    """The cosine schedule, alpha = cos(pi u / 2), in continuous time: -2 log tan(pi u / 2), within +-15.

    Args:
        u: time in [0, 1]; 1 is noise alone.
    """
    angle = jnp.pi / 2 * u
    log_tan = jnp.log(jnp.sin(angle)) - jnp.log(jnp.maximum(jnp.cos(angle), 0.0))  # in float32, cos(pi / 2) is negative
    return jnp.clip(-2 * log_tan, -MAX_LOG_SNR, MAX_LOG_SNR)


def linear_log_snr(u: Float[Array, " n"]) -> Float[Array, " n"]:
    """A log SNR that falls linearly from 15 to -15."""
    return MAX_LOG_SNR * (1 - 2 * u)


# Densities of the level in training


def uniform(key: Key, n: int, *, log_snr_of: LogSnrOf) -> PerExample:
    """Independent uniform times."""
    return log_snr_of(jax.random.uniform(key, (n,)))


def stratified(key: Key, n: int, *, log_snr_of: LogSnrOf) -> PerExample:
    """One uniform time in each n-th of [0, 1], so that a batch covers it evenly (compare VDM appendix I.1)."""
    return log_snr_of((jnp.arange(n) + jax.random.uniform(key, (n,))) / n)


def logit_normal(key: Key, n: int, *, log_snr_of: LogSnrOf, mean: float = 0.0, std: float = 1.0) -> PerExample:
    """Times whose logit is normal (Esser et al. 2024, arXiv 2403.03206, section 3.1)."""
    return log_snr_of(jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,))))


def log_sigma_normal(key: Key, n: int, *, log_snr_of: LogSnrOf, mean: float = -1.2, std: float = 1.2) -> PerExample:
    """Log noise-to-signal ratios that are normal (EDM section 5). There is no time, so `log_snr_of` has no effect."""
    return -2 * (mean + std * jax.random.normal(key, (n,)))


# Grids for sampling: log SNRs as float64, ascending


def even_in_time(steps: int, low: float, high: float, *, log_snr_of: LogSnrOf) -> np.ndarray:
    """Levels evenly spaced in the schedule's time; those beyond the two log SNRs take these, which may repeat."""
    u = jnp.linspace(1, 0, steps + 1)[:-1]
    return np.clip(np.asarray(log_snr_of(u), np.float64), low, high)


def even_in_log_snr(steps: int, low: float, high: float, *, log_snr_of: LogSnrOf) -> np.ndarray:
    """Levels evenly spaced in the log SNR."""
    return np.linspace(low, high, steps + 1)[:-1]


def karras(steps: int, low: float, high: float, *, log_snr_of: LogSnrOf) -> np.ndarray:
    """Levels even in the noise-to-signal ratio to the power 1/7 (EDM eq. 5)."""
    largest, smallest = math.exp(-low / 2 / RHO), math.exp(-high / 2 / RHO)
    return -2 * RHO * np.log(np.linspace(largest, smallest, steps))
