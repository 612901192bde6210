"""Training objectives and the terms of the variational bound, one number per example.

Owns the objective; which level to train on and how examples are weighted is `timesteps` and `continuous`. Denoisers are
those of `make_denoiser`, whose x_0 is not clipped.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Cond, Image, PerExample
from fooddiff.diffusion.denoiser import Denoiser, Error, Prediction
from fooddiff.diffusion.level import Gaussian, Level, Transition, add_noise, per_image, q_posterior


class LossTerms(NamedTuple):
    """An objective of a discrete process and the two quantities that each of them reports, f32[n] each."""

    total: PerExample  # what is minimised
    mse: PerExample  # mean squared error of the prediction
    vb: PerExample  # the term of the variational bound at t, in bits/dim, unweighted


class WeightedTerms(NamedTuple):
    """The weighted squared error of x_0, f32[n] each."""

    total: PerExample  # what is minimised
    x0_mse: PerExample  # mean squared error of x_0


def weighted_loss(
    weight: Callable[[PerExample], PerExample], denoise: Denoiser, x_0: Image, level: Level, eps: Image, cond: Cond
) -> WeightedTerms:
    """The squared error of x_0, averaged over the image and weighted by a function of the log SNR (see `weights`)."""
    prediction = denoise(add_noise(level, x_0, eps), level, cond)
    x0_mse = _mean_flat((x_0 - prediction.x_0) ** 2)
    return WeightedTerms(weight(level.log_snr) * x0_mse, x0_mse)


def mse_loss(error: Error, denoise: Denoiser, x_0: Image, step: Transition, eps: Image, cond: Cond) -> LossTerms:
    """L_simple (DDPM eq. 14): the squared error of the prediction, averaged over the image."""
    x_t = add_noise(step.level, x_0, eps)
    prediction = denoise(x_t, step.level, cond)
    mse = _mean_flat(error(step.level, prediction, x_0, eps) ** 2)
    return LossTerms(mse, mse, bound_term(jax.lax.stop_gradient(prediction), x_0, x_t, step))


def hybrid_loss(
    error: Error, denoise: Denoiser, x_0: Image, step: Transition, eps: Image, cond: Cond, *, vb_weight: float
) -> LossTerms:
    """L_hybrid = L_simple + vb_weight * L_vlb (IDDPM eq. 16).

    The bound trains the variance only: its mean is held fixed by a stop-gradient, so that L_simple alone decides what
    the network predicts (IDDPM section 3.1).

    Args:
        error: of the prediction, in the space of the network's output.
        denoise: the denoiser; its variance must be learned for the second term to have a gradient.
        x_0: [n, h, w, c] in [-1, 1].
        step: of a discrete process, one per example.
        eps: standard normal noise in the shape of x_0.
        cond: conditions.
        vb_weight: weight of the bound's term, which is in bits/dim. The reference uses T/1000 (its "rescaled MSE",
            equal to 0.001 times the T-fold term that estimates the whole bound) or 1.

    Returns:
        The terms, f32[n] each.
    """
    x_t = add_noise(step.level, x_0, eps)
    prediction = denoise(x_t, step.level, cond)
    frozen_mean = jax.lax.stop_gradient(prediction)._replace(log_var=prediction.log_var)
    mse = _mean_flat(error(step.level, prediction, x_0, eps) ** 2)
    vb = bound_term(frozen_mean, x_0, x_t, step)
    return LossTerms(mse + vb_weight * vb, mse, vb)


def vlb_loss(
    error: Error, denoise: Denoiser, x_0: Image, step: Transition, eps: Image, cond: Cond, *, num_timesteps: int
) -> LossTerms:
    """L_vlb (IDDPM eq. 4): T times the bound's term at t, an estimate of the whole bound in bits/dim."""
    x_t = add_noise(step.level, x_0, eps)
    prediction = denoise(x_t, step.level, cond)
    vb = bound_term(prediction, x_0, x_t, step)
    mse = _mean_flat(error(step.level, jax.lax.stop_gradient(prediction), x_0, eps) ** 2)
    return LossTerms(num_timesteps * vb, mse, vb)


def bound_term(prediction: Prediction, x_0: Image, x_t: Image, step: Transition) -> PerExample:
    """The bound's term at t in bits/dim (IDDPM eq. 5 and 6).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0; at t = 0 the negative log likelihood of the 8-bit image
    under the discretised Gaussian decoder.
    """
    mean = q_posterior(step, prediction.x_0, x_t).mean
    kl = _normal_kl(q_posterior(step, x_0, x_t), Gaussian(mean, prediction.log_var))
    decoder_nll = -_discretized_log_likelihood(x_0, mean, prediction.log_var)
    return _mean_flat(jnp.where(per_image(step.remaining == 0), decoder_nll, kl)) / math.log(2)


def prior_term(x_0: Image, noisiest: Level) -> PerExample:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in bits/dim (IDDPM eq. 7). It has no parameters."""
    marginal = Gaussian(per_image(noisiest.alpha) * x_0, per_image(-jax.nn.softplus(noisiest.log_snr)))
    return _mean_flat(_normal_kl(marginal, Gaussian(0.0, 0.0))) / math.log(2)


def _mean_flat(x: Array) -> PerExample:
    return x.mean(axis=(1, 2, 3))


def _normal_kl(a: Gaussian, b: Gaussian) -> Array:
    """KL(a || b) in nats, elementwise."""
    ratio = jnp.exp(a.log_var - b.log_var)
    return 0.5 * (-1 + b.log_var - a.log_var + ratio + (a.mean - b.mean) ** 2 * jnp.exp(-b.log_var))


def _normal_cdf(x: Array) -> Array:
    """Tanh approximation of the standard normal CDF (Page 1977), the one the reference uses."""
    return 0.5 * (1 + _tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _tanh(x: Array) -> Array:
    """Hyperbolic tangent with the right rounding near -1 and 1, which XLA's own approximation misses by some units.

    A bin far out in a tail has a probability of a few such units, or of none, so the decoder's bits depend on them.
    """
    sign = jnp.where(x < 0, -1.0, 1.0)
    return sign * (1 - 2 / (jnp.exp(2 * jnp.minimum(sign * x, 10)) + 1))  # tanh(10) is 1 in float32


def _discretized_log_likelihood(x: Image, mean: Image, log_var: Array) -> Image:
    """Log probability in nats that a Gaussian gives to the 8-bit bin around x (DDPM eq. 13).

    Bins are 2/255 wide; the outermost two reach to infinity. Probabilities are floored at 1e-12.
    """
    inv_std = jnp.exp(-0.5 * log_var)
    upper = _normal_cdf(inv_std * (x - mean + 1 / 255))
    lower = _normal_cdf(inv_std * (x - mean - 1 / 255))
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))
