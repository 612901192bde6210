"""Sampling: one-step updates that take their noise, and the one loop that applies them.

A step is `step(process, param, out, x_t, t, noise) -> x_{t-1}`; keyword settings are bound with functools.partial.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, DenoiseFn, Image, Int, Label, Timestep
from fooddiff.diffusion.process import GaussianDiffusion, at, eps_from_x0
from fooddiff.diffusion.reverse import Parameterization, reverse_gaussian

StepFn: TypeAlias = Callable[[GaussianDiffusion, Parameterization, Array, Image, Timestep, Image], Image]


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


def ddim_reverse_step(
    process: GaussianDiffusion, param: Parameterization, out: Array, x_t: Image, t: Timestep, *, clip: bool = True
) -> Image:
    """Encodes: runs DDIM eq. 12 with eta = 0 towards more noise and returns x_{t+1}."""
    x_0 = reverse_gaussian(process, param, out, x_t, t, clip=clip).x_0
    eps = eps_from_x0(process, x_0, x_t, t)
    alpha_bar_next = at(process.alpha_bar_next, t)
    return jnp.sqrt(alpha_bar_next) * x_0 + jnp.sqrt(1 - alpha_bar_next) * eps


def sample(
    step: StepFn, process: GaussianDiffusion, param: Parameterization, denoise: DenoiseFn,
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

    def body(x_t, t):
        t_batch = jnp.full(x_t.shape[:1], t)
        out = denoise(x_t, process.model_timesteps[t_batch], y)
        return step(process, param, out, x_t, t_batch, noise(t)), None

    x_0, _ = jax.lax.scan(body, x_T, jnp.arange(process.num_timesteps)[::-1])
    return x_0


def _unless_last(t: Timestep) -> Array:
    """1 where the step adds noise, 0 at t = 0."""
    return (t != 0).astype(jnp.float32)[:, None, None, None]
