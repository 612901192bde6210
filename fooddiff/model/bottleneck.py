"""What lies between an autoencoder's encoder and its decoder: a diagonal Gaussian, or a codebook. Pure functions."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Float, Image, Int, Params, PerExample, Scalar

LOG_VAR_RANGE = (-30.0, 20.0)
"""Where latent-diffusion keeps the log variance, so that its exponential neither vanishes nor overflows."""


class Posterior(NamedTuple):
    """q(z | x), a Gaussian with a diagonal covariance (Kingma & Welling 2014)."""

    mean: Image  # f32[n, h, w, c]
    log_var: Image  # f32[n, h, w, c]


def posterior_of(moments: Float[Array, "n h w c2"]) -> Posterior:
    """Reads an encoder's output: means in the first half of the channels, log variances, to be clamped, in the second.

    Args:
        moments: f32[n, h, w, 2c].

    Returns:
        The posterior over f32[n, h, w, c].
    """
    mean, log_var = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(log_var, *LOG_VAR_RANGE))


def draw(posterior: Posterior, noise: Image) -> Image:
    """The sample that standard normal noise f32[n, h, w, c] stands for, differentiable in the posterior."""
    return posterior.mean + jnp.exp(posterior.log_var / 2) * noise


def kl_divergence(posterior: Posterior, other: Posterior | None = None) -> PerExample:
    """KL(posterior || other), summed over positions and channels.

    Args:
        posterior: over f32[n, h, w, c].
        other: a Gaussian over the same, which serves parity; None is the standard normal one.

    Returns:
        f32[n] in nats.
    """
    mean, log_var = posterior
    if other is None:
        return 0.5 * (mean**2 + jnp.exp(log_var) - 1 - log_var).sum(axis=(1, 2, 3))
    ratio = (mean - other.mean) ** 2 / jnp.exp(other.log_var) + jnp.exp(log_var - other.log_var)
    return 0.5 * (ratio - 1 - log_var + other.log_var).sum(axis=(1, 2, 3))


def negative_log_density(posterior: Posterior, z: Image) -> PerExample:
    """-log of the density at z f32[n, h, w, c], summed over positions and channels: f32[n] in nats. Serves parity."""
    mean, log_var = posterior
    return 0.5 * (math.log(2 * math.pi) + log_var + (z - mean) ** 2 / jnp.exp(log_var)).sum(axis=(1, 2, 3))


class Quantized(NamedTuple):
    """Latents replaced by their nearest codes."""

    z: Image  # f32[n, h, w, d], the codes; gradients pass straight through to what was quantised
    indices: Int[Array, "n h w"]  # in [0, k)
    loss: Scalar  # mean squared distance to the codes, weighted


def quantize(z: Image, codebook: Float[Array, "k d"], *, beta: float = 0.25, legacy: bool = True) -> Quantized:
    """Replaces every position's vector by the code next to it (van den Oord et al. 2017).

    The loss has two parts of the same value: the pull of the latents towards their codes and that of the codes towards
    their latents. The paper weights the former with beta. Latent-diffusion weights the latter, which began as a
    mistake and was kept for its checkpoints.

    Args:
        z: f32[n, h, w, d].
        codebook: f32[k, d].
        beta: the weight, at least 0.
        legacy: weight the codes' part, as latent-diffusion does; the paper's weighting serves parity.

    Returns:
        Codes, indices and the loss, which is (1 + beta) times the mean squared distance.
    """
    indices = nearest_code(z, codebook)
    code = codebook[indices]
    to_code = ((jax.lax.stop_gradient(code) - z) ** 2).mean()
    to_latent = ((code - jax.lax.stop_gradient(z)) ** 2).mean()
    loss = to_code + beta * to_latent if legacy else beta * to_code + to_latent
    return Quantized(z + jax.lax.stop_gradient(code - z), indices, loss)


def nearest_code(z: Image, codebook: Float[Array, "k d"]) -> Int[Array, "n h w"]:
    """The index of the code with the smallest distance to each position's vector, the first of equals."""
    products = jnp.einsum("nhwd,kd->nhwk", z, codebook, precision=jax.lax.Precision.HIGHEST)
    return ((codebook**2).sum(axis=1)[None, None, None] - 2 * products).argmin(axis=-1)


class Bottleneck(NamedTuple):
    """How latents are read from an encoder's output, and what a decoder makes them from. Nothing is drawn."""

    latents: Callable[[Array], Image]  # the encoder's output -> latents
    to_decoder: Callable[[Params, Image], Image]  # (parameters, latents) -> what the decoder takes


GAUSSIAN = Bottleneck(lambda moments: posterior_of(moments).mean, lambda params, z: z)
CODEBOOK = Bottleneck(lambda z: z, lambda params, z: params["codebook"][nearest_code(z, params["codebook"])])
OPEN = Bottleneck(lambda z: z, lambda params, z: z)
"""What an encoder without any of these gives is its latents."""
