"""The variational bound on -log p(x_0), summed over all timesteps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Cond, Float, Image, Int, PerExample
from fooddiff.diffusion.denoiser import Denoiser
from fooddiff.diffusion.level import Transition, add_noise, for_batch
from fooddiff.diffusion.losses import bound_term, prior_term


class Likelihood(NamedTuple):
    """The bound and its parts."""

    total: PerExample  # bits/dim: prior + the sum of vb
    prior: PerExample  # bits/dim
    vb: Float[Array, "n T"]  # bits/dim per timestep
    x0_mse: Float[Array, "n T"]  # squared error of the predicted x_0
    eps_mse: Float[Array, "n T"]  # squared error of the eps that belongs to it


def bits_per_dim(
    denoise: Denoiser, steps: Transition, x_0: Image, noise: Callable[[Int[Array, ""]], Image], cond: Cond
) -> Likelihood:
    """Evaluates the bound of IDDPM eq. 4 to 7 with one draw of noise per timestep.

    Args:
        denoise: the denoiser; it models the variance of a step.
        steps: all steps of a discrete process, the noisiest first.
        x_0: [n, h, w, c], 8-bit images scaled to [-1, 1].
        noise: gives the standard normal noise of timestep t (a traced scalar), in the shape of x_0.
        cond: conditions.

    Returns:
        The bound in bits/dim and its terms, by ascending timestep.
    """

    def term(_, step):
        step = for_batch(step, len(x_0))
        eps = noise(step.remaining[0])
        x_t = add_noise(step.level, x_0, eps)
        prediction = denoise(x_t, step.level, cond)
        vb = bound_term(prediction, x_0, x_t, step)
        x0_mse, eps_mse = (((a - b) ** 2).mean((1, 2, 3)) for a, b in ((prediction.x_0, x_0), (prediction.eps, eps)))
        return None, (vb, x0_mse, eps_mse)

    _, terms = jax.lax.scan(term, None, steps)
    vb, x0_mse, eps_mse = (jnp.moveaxis(term[::-1], 0, 1) for term in terms)
    noisiest = for_batch(jax.tree.map(lambda field: field[0], steps.level), len(x_0))
    prior = prior_term(x_0, noisiest)
    return Likelihood(prior + vb.sum(axis=1), prior, vb, x0_mse, eps_mse)
