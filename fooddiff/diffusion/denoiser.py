"""Denoisers: a network read as x_0 and eps. Owns the meaning of a network's output channels.

A `Denoiser` is (x_t, level, cond) -> Prediction, whatever the network was trained to predict. Losses, samplers and
guidance see denoisers only, and guidance is a function from denoisers to denoisers.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp

from fooddiff.arrays import Array, Cond, Float, Image
from fooddiff.diffusion.level import Level, eps_from_x0, per_image, x0_from_eps

EDM_DATA_STD = 0.5  # of images in [-1, 1] (EDM table 1)


class Prediction(NamedTuple):
    """What a denoiser says about a noisy image; x_t = alpha x_0 + sigma eps holds for its x_0 and eps."""

    x_0: Image
    eps: Image
    log_var: Float[Array, "n 1 1 1"] | Image | None  # of the step that leaves the level; None where it is not modelled


Denoiser: TypeAlias = Callable[[Image, Level, Cond], Prediction]
Reading: TypeAlias = Callable[[Level, Image, Image], tuple[Image, Image]]  # (level, output, x_t) -> (x_0, eps)
LogVar: TypeAlias = Callable[[Level, Image], Array]  # (level, variance channels) -> log variance
Error: TypeAlias = Callable[[Level, Prediction, Image, Image], Image]  # (level, prediction, x_0, eps) -> difference


def make_denoiser(apply: Callable[..., Array], read: Reading, log_var: LogVar | None = None) -> Denoiser:
    """Makes a denoiser of a network.

    Args:
        apply: (x_t, network_time, cond) -> output [n, h, w, c or 2c]; the second half are variance channels.
        read: what the first c channels mean.
        log_var: what the variance of a step is; None leaves it open.

    Returns:
        The denoiser. Its x_0 is not clipped; see `clipped`.
    """

    def denoise(x_t: Image, level: Level, cond: Cond) -> Prediction:
        out = apply(x_t, level.network_time, cond)
        output, v = split_output(out, x_t)
        x_0, eps = read(level, output, x_t)
        return Prediction(x_0, eps, None if log_var is None else log_var(level, v))

    return denoise


def clipped(denoise: Denoiser) -> Denoiser:
    """Clips the predicted x_0 to [-1, 1]; eps follows."""

    def clipping(x_t: Image, level: Level, cond: Cond) -> Prediction:
        prediction = denoise(x_t, level, cond)
        x_0 = jnp.clip(prediction.x_0, -1, 1)
        return prediction._replace(x_0=x_0, eps=eps_from_x0(level, x_0, x_t))

    return clipping


def split_output(out: Array, x_t: Image) -> tuple[Image, Image]:
    """Splits a network output [n, h, w, c or 2c] into (prediction [.., c], variance channels [.., 0 or c])."""
    channels = x_t.shape[-1]
    return out[..., :channels], out[..., channels:]


# Readings: what the output of a network is


def read_eps(level: Level, output: Image, x_t: Image) -> tuple[Image, Image]:
    """The output is eps (DDPM section 3.2)."""
    return x0_from_eps(level, output, x_t), output


def read_x0(level: Level, output: Image, x_t: Image) -> tuple[Image, Image]:
    """The output is x_0."""
    return output, eps_from_x0(level, output, x_t)


def read_v(level: Level, output: Image, x_t: Image) -> tuple[Image, Image]:
    """The output is v = alpha eps - sigma x_0 (Salimans, Ho 2022, arXiv 2202.00512, appendix D)."""
    alpha, sigma = per_image(level.alpha), per_image(level.sigma)
    return alpha * x_t - sigma * output, sigma * x_t + alpha * output


def read_flow(level: Level, output: Image, x_t: Image) -> tuple[Image, Image]:
    """The output is eps - x_0, the velocity of the straight path from image to noise (Lipman et al., 2210.02747)."""
    alpha, sigma = per_image(level.alpha), per_image(level.sigma)
    return (x_t - sigma * output) / (alpha + sigma), (x_t + alpha * output) / (alpha + sigma)


def read_edm(level: Level, output: Image, x_t: Image) -> tuple[Image, Image]:
    """The output is F of EDM eq. 7, of unit variance at every level: x_0 = c_skip x_t / alpha + c_out F.

    The network gets x_t, whose scale needs no c_in.
    """
    noise = per_image(level.noise_to_signal)
    variance = noise**2 + EDM_DATA_STD**2
    skip = EDM_DATA_STD**2 / variance * per_image(level.inv_alpha)
    x_0 = skip * x_t + noise * EDM_DATA_STD / jnp.sqrt(variance) * output
    return x_0, eps_from_x0(level, x_0, x_t)


# Errors: the difference whose square L_simple is, in the space of the network's own output


def eps_error(level: Level, prediction: Prediction, x_0: Image, eps: Image) -> Image:
    """Of a network that predicts eps."""
    return eps - prediction.eps


def x0_error(level: Level, prediction: Prediction, x_0: Image, eps: Image) -> Image:
    """Of a network that predicts x_0."""
    return x_0 - prediction.x_0


def v_error(level: Level, prediction: Prediction, x_0: Image, eps: Image) -> Image:
    """Of a network that predicts v."""
    return per_image(level.alpha) * (eps - prediction.eps) - per_image(level.sigma) * (x_0 - prediction.x_0)


# Log variances of a step of a discrete process


def fixed_small(level: Level, v: Image) -> Array:
    """The posterior's own variance, the lower choice of DDPM section 3.2. `v` is empty."""
    return per_image(level.log_var_range[0])


def fixed_large(level: Level, v: Image) -> Array:
    """beta_t, the upper choice of DDPM section 3.2; t = 0 takes the posterior variance of t = 1. `v` is empty."""
    small, large = level.log_var_range
    return per_image(jnp.where(level.index == 0, small, large))


def learned_range(level: Level, v: Image) -> Image:
    """Interpolates between the posterior's log variance and log beta_t (IDDPM eq. 15).

    Args:
        level: of a discrete process.
        v: the network's variance channels; -1 selects the posterior variance and 1 selects beta_t, unclipped between
            and beyond.

    Returns:
        Log variance in the shape of `v`.
    """
    small, large = level.log_var_range
    frac = (v + 1) / 2
    return frac * per_image(large) + (1 - frac) * per_image(small)
