"""Training objectives and the terms of the variational bound, one number per example.

Owns the objective; which t to train on and how examples are weighted is `timesteps`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, DenoiseFn, Image, Label, PerExample, Timestep
from fooddiff.diffusion.process import Gaussian, GaussianDiffusion, q_marginal, q_posterior, q_sample
from fooddiff.diffusion.reverse import Parameterization, reverse_gaussian, split_output


class LossTerms(NamedTuple):
    """One objective and the two quantities that every objective reports, f32[n] each."""

    total: PerExample  # what is minimised
    mse: PerExample  # mean squared error of the prediction
    vb: PerExample  # the term of the variational bound at t, in bits/dim, unweighted


def mse_loss(
    process: GaussianDiffusion, param: Parameterization, denoise: DenoiseFn,
    x_0: Image, t: Timestep, eps: Image, y: Label | None,
) -> LossTerms:  # fmt: skip
    """L_simple (DDPM eq. 14): the squared error of the prediction, averaged over the image."""
    x_t = q_sample(process, x_0, t, eps)
    out = denoise(x_t, process.model_timesteps[t], y)
    mse = squared_error(param, out, x_0, eps)
    return LossTerms(mse, mse, bound_term(process, param, jax.lax.stop_gradient(out), x_0, x_t, t, clip=False))


def hybrid_loss(
    process: GaussianDiffusion, param: Parameterization, denoise: DenoiseFn,
    x_0: Image, t: Timestep, eps: Image, y: Label | None, *, vb_weight: float,
) -> LossTerms:  # fmt: skip
    """L_hybrid = L_simple + vb_weight * L_vlb (IDDPM eq. 16).

    The bound trains the variance only: its mean is held fixed by a stop-gradient, so that L_simple alone decides what
    the network predicts (IDDPM section 3.1).

    Args:
        process: the process.
        param: what the network predicts; its variance must be learned for the second term to have a gradient.
        denoise: the network.
        x_0: [n, h, w, c] in [-1, 1].
        t: i32[n].
        eps: standard normal noise in the shape of x_0.
        y: i32[n] labels, or None.
        vb_weight: weight of the bound's term, which is in bits/dim. The reference uses T/1000 (its "rescaled MSE",
            equal to 0.001 times the T-fold term that estimates the whole bound) or 1.

    Returns:
        The terms, f32[n] each.
    """
    x_t = q_sample(process, x_0, t, eps)
    out = denoise(x_t, process.model_timesteps[t], y)
    prediction, v = split_output(out, x_t)
    frozen_mean = jnp.concatenate([jax.lax.stop_gradient(prediction), v], axis=-1)
    mse = squared_error(param, out, x_0, eps)
    vb = bound_term(process, param, frozen_mean, x_0, x_t, t, clip=False)
    return LossTerms(mse + vb_weight * vb, mse, vb)


def vlb_loss(
    process: GaussianDiffusion, param: Parameterization, denoise: DenoiseFn,
    x_0: Image, t: Timestep, eps: Image, y: Label | None,
) -> LossTerms:  # fmt: skip
    """L_vlb (IDDPM eq. 4): T times the bound's term at t, an estimate of the whole bound in bits/dim."""
    x_t = q_sample(process, x_0, t, eps)
    out = denoise(x_t, process.model_timesteps[t], y)
    vb = bound_term(process, param, out, x_0, x_t, t, clip=False)
    return LossTerms(process.num_timesteps * vb, squared_error(param, jax.lax.stop_gradient(out), x_0, eps), vb)


def bound_term(
    process: GaussianDiffusion, param: Parameterization, out: Array, x_0: Image, x_t: Image, t: Timestep, *, clip: bool
) -> PerExample:
    """The bound's term at t in bits/dim (IDDPM eq. 5 and 6).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0; at t = 0 the negative log likelihood of the 8-bit image
    under the discretised Gaussian decoder.
    """
    step = reverse_gaussian(process, param, out, x_t, t, clip=clip)
    kl = _normal_kl(q_posterior(process, x_0, x_t, t), Gaussian(step.mean, step.log_var))
    decoder_nll = -_discretized_log_likelihood(x_0, step.mean, step.log_var)
    return _mean_flat(jnp.where((t == 0)[:, None, None, None], decoder_nll, kl)) / math.log(2)


def prior_term(process: GaussianDiffusion, x_0: Image) -> PerExample:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in bits/dim (IDDPM eq. 7). It has no parameters."""
    last = jnp.full(x_0.shape[:1], process.num_timesteps - 1)
    return _mean_flat(_normal_kl(q_marginal(process, x_0, last), Gaussian(0.0, 0.0))) / math.log(2)


def squared_error(param: Parameterization, out: Array, x_0: Image, eps: Image) -> PerExample:
    """Mean over the image of the squared error between the prediction and its target."""
    prediction, _ = split_output(out, x_0)
    return _mean_flat((param.target(x_0, eps) - prediction) ** 2)


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
