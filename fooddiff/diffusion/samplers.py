"""Sampling: updates that take their noise, and the one loop that applies them.

A step is `step(process, param, out, x_t, t, noise) -> x_{t-1}`. A multistep update also takes what the step before it
has left, and leaves something to the next one. Keyword settings are bound with functools.partial.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, DenoiseFn, Image, Int, Label, Timestep
from fooddiff.diffusion.process import GaussianDiffusion, at, eps_from_x0
from fooddiff.diffusion.reverse import Parameterization, reverse_gaussian

StepFn: TypeAlias = Callable[[GaussianDiffusion, Parameterization, Array, Image, Timestep, Image], Image]
MultistepFn: TypeAlias = Callable[
    [GaussianDiffusion, Parameterization, Array, Image, Timestep, Image, Image], tuple[Image, Image]
]
"""(process, param, out, x_t, t, noise, left by the step before) -> (x_{t-1}, left to the next)."""


def ancestral_step(
    process: GaussianDiffusion, param: Parameterization, out: Array, x_t: Image, t: Timestep, noise: Image,
    *, clip: bool = True,
) -> Image:  # fmt: skip
    """Draws x_{t-1} ~ p(x_{t-1} | x_t) (DDPM algorithm 2). At t = 0 it returns the mean."""
    step = reverse_gaussian(process, param, out, x_t, t, clip=clip)
    return step.mean + _unless_last(t) * jnp.exp(0.5 * step.log_var) * noise


def ddim_step(
    process: GaussianDiffusion, param: Parameterization, out: Array, x_t: Image, t: Timestep, noise: Image,
    *, clip: bool = True, eta: float = 0.0,
) -> Image:  # fmt: skip
    """The update of DDIM eq. 12.

    Args:
        process: the process.
        param: what the network predicts. A learned variance is not used.
        out: network output [n, h, w, c or 2c].
        x_t: [n, h, w, c].
        t: i32[n].
        noise: standard normal, in the shape of x_t; has no effect when eta is 0.
        clip: clip the predicted x_0 to [-1, 1].
        eta: 0 is deterministic, 1 has the variance of the posterior (DDIM eq. 16).

    Returns:
        x_{t-1}, [n, h, w, c].
    """
    x_0 = reverse_gaussian(process, param, out, x_t, t, clip=clip).x_0
    eps = eps_from_x0(process, x_0, x_t, t)
    alpha_bar, alpha_bar_prev = at(process.alpha_bar, t), at(process.alpha_bar_prev, t)
    sigma = eta * jnp.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * jnp.sqrt(1 - alpha_bar / alpha_bar_prev)
    mean = jnp.sqrt(alpha_bar_prev) * x_0 + jnp.sqrt(1 - alpha_bar_prev - sigma**2) * eps
    return mean + _unless_last(t) * sigma * noise


def dpmpp_2m_step(
    process: GaussianDiffusion, param: Parameterization, out: Array, x_t: Image, t: Timestep, noise: Image,
    before: Image, *, clip: bool = True,
) -> tuple[Image, Image]:  # fmt: skip
    """The update of DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), of second order in the step.

    It is exact where x_0 is linear in lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio. The
    first step, which has none before it, and the last one, which ends at lambda = infinity, take x_0 as constant; that
    is DDIM with eta = 0.

    Args:
        process: the process.
        param: what the network predicts. A learned variance is not used: the update solves the deterministic ODE.
        out: network output [n, h, w, c or 2c].
        x_t: [n, h, w, c].
        t: i32[n].
        noise: has no effect.
        before: the x_0 that the step before predicted, in the shape of x_t; has no effect on the first step.
        clip: clip the predicted x_0 to [-1, 1].

    Returns:
        x_{t-1} and the predicted x_0, both [n, h, w, c].
    """
    x_0 = reverse_gaussian(process, param, out, x_t, t, clip=clip).x_0
    alpha, sigma = at(process.sqrt_alpha_bar, t), at(process.sqrt_one_minus_alpha_bar, t)
    alpha_prev, sigma_prev = jnp.sqrt(at(process.alpha_bar_prev, t)), jnp.sqrt(1 - at(process.alpha_bar_prev, t))
    alpha_next, sigma_next = jnp.sqrt(at(process.alpha_bar_next, t)), jnp.sqrt(1 - at(process.alpha_bar_next, t))

    inner = ((t > 0) & (t < process.num_timesteps - 1))[:, None, None, None]
    step = jnp.log(alpha_prev / alpha) - jnp.log(jnp.where(inner, sigma_prev, sigma) / sigma)  # of lambda
    last = jnp.log(alpha / jnp.where(inner, alpha_next, alpha)) - jnp.log(sigma / sigma_next)
    slope = jnp.where(inner, step / (2 * jnp.where(inner, last, 1.0)), 0.0)
    x_0_ahead = x_0 + slope * (x_0 - before)
    decay = sigma_prev / sigma  # alpha_prev * exp(-step) = alpha * decay
    return decay * x_t + (alpha_prev - alpha * decay) * x_0_ahead, x_0


def ddim_reverse_step(
    process: GaussianDiffusion, param: Parameterization, out: Array, x_t: Image, t: Timestep, *, clip: bool = True
) -> Image:
    """Encodes: runs DDIM eq. 12 with eta = 0 towards more noise and returns x_{t+1}."""
    x_0 = reverse_gaussian(process, param, out, x_t, t, clip=clip).x_0
    eps = eps_from_x0(process, x_0, x_t, t)
    alpha_bar_next = at(process.alpha_bar_next, t)
    return jnp.sqrt(alpha_bar_next) * x_0 + jnp.sqrt(1 - alpha_bar_next) * eps


def single(step: StepFn) -> MultistepFn:
    """A one-step update in the form that the loop applies: it takes nothing and leaves nothing."""

    def multistep(process, param, out, x_t, t, noise, before):
        return step(process, param, out, x_t, t, noise), before

    return multistep


def sample(
    step: MultistepFn, process: GaussianDiffusion, param: Parameterization, denoise: DenoiseFn,
    x_T: Image, noise: Callable[[Int[Array, ""]], Image], y: Label | None,
) -> Image:  # fmt: skip
    """Runs the reverse process from t = T-1 to 0 as one `lax.scan`.

    Args:
        step: the update.
        process: the process, respaced for fewer steps.
        param: what the network predicts.
        denoise: the network.
        x_T: standard normal, [n, h, w, c].
        noise: gives the standard normal noise of step t (a traced scalar), in the shape of x_T.
        y: i32[n] labels, or None.

    Returns:
        x_0, [n, h, w, c], about in [-1, 1].
    """

    def body(carry, t):
        x_t, before = carry
        t_batch = jnp.full(x_t.shape[:1], t)
        out = denoise(x_t, process.model_timesteps[t_batch], y)
        return step(process, param, out, x_t, t_batch, noise(t), before), None

    (x_0, _), _ = jax.lax.scan(body, (x_T, jnp.zeros_like(x_T)), jnp.arange(process.num_timesteps)[::-1])
    return x_0


def _unless_last(t: Timestep) -> Array:
    """1 where the step adds noise, 0 at t = 0."""
    return (t != 0).astype(jnp.float32)[:, None, None, None]
