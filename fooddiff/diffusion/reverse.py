"""The reverse process p(x_{t-1} | x_t): how a network output becomes a Gaussian.

Owns the meaning of the network's channels. A `Parameterization` is three function values, chosen once when a model is
built, so that nothing downstream asks which kind of model it has.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from fooddiff.arrays import Array, Float, Image, Timestep
from fooddiff.diffusion.process import GaussianDiffusion, at, q_posterior


class Parameterization(NamedTuple):
    """What a network predicts."""

    to_x0: Callable[[GaussianDiffusion, Image, Image, Timestep], Image]  # (process, prediction, x_t, t) -> x_0
    target: Callable[[Image, Image], Image]  # (x_0, eps) -> what the prediction is regressed on
    log_var: Callable[[GaussianDiffusion, Image, Timestep], Array]  # (process, variance channels, t) -> log variance


class ReverseStep(NamedTuple):
    """The Gaussian p(x_{t-1} | x_t) and the x_0 that its mean came from."""

    mean: Image
    log_var: Float[Array, "n 1 1 1"] | Image
    x_0: Image


def eps_target(x_0: Image, eps: Image) -> Image:
    """`target` of a network that predicts the noise."""
    return eps


def x0_target(x_0: Image, eps: Image) -> Image:
    """`target` of a network that predicts x_0."""
    return x_0


def x0_as_predicted(process: GaussianDiffusion, prediction: Image, x_t: Image, t: Timestep) -> Image:
    """`to_x0` of a network that predicts x_0 itself."""
    return prediction


def fixed_small(process: GaussianDiffusion, v: Image, t: Timestep) -> Array:
    """The posterior's own variance, the lower choice of DDPM section 3.2. `v` is empty."""
    return at(process.posterior_log_var, t)


def fixed_large(process: GaussianDiffusion, v: Image, t: Timestep) -> Array:
    """beta_t, the upper choice of DDPM section 3.2; t = 0 takes the posterior variance of t = 1. `v` is empty."""
    log_var = jnp.concatenate([process.posterior_log_var[:1], process.log_beta[1:]])
    return at(log_var, t)


def learned_range(process: GaussianDiffusion, v: Image, t: Timestep) -> Image:
    """Interpolates between the two fixed log variances (IDDPM eq. 15).

    Args:
        process: the process.
        v: the network's variance channels; -1 selects the posterior variance and 1 selects beta_t, unclipped between
            and beyond.
        t: the timestep.

    Returns:
        Log variance in the shape of `v`.
    """
    frac = (v + 1) / 2
    return frac * at(process.log_beta, t) + (1 - frac) * at(process.posterior_log_var, t)


def split_output(out: Array, x_t: Image) -> tuple[Image, Image]:
    """Splits a network output [n, h, w, c or 2c] into (prediction [.., c], variance channels [.., 0 or c])."""
    channels = x_t.shape[-1]
    return out[..., :channels], out[..., channels:]


def reverse_gaussian(
    process: GaussianDiffusion, param: Parameterization, out: Array, x_t: Image, t: Timestep, *, clip: bool
) -> ReverseStep:
    """p(x_{t-1} | x_t): the posterior (DDPM eq. 7) at the predicted x_0, with the model's variance.

    Args:
        process: the process.
        param: what the network predicts.
        out: network output [n, h, w, c or 2c].
        x_t: [n, h, w, c].
        t: i32[n].
        clip: clip the predicted x_0 to [-1, 1] first, as sampling does and training does not.

    Returns:
        Mean, log variance (broadcasts over images when it is fixed) and the predicted x_0.
    """
    prediction, v = split_output(out, x_t)
    x_0 = param.to_x0(process, prediction, x_t, t)
    if clip:
        x_0 = jnp.clip(x_0, -1, 1)
    return ReverseStep(q_posterior(process, x_0, x_t, t).mean, param.log_var(process, v, t), x_0)
