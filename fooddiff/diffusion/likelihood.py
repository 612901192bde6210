"""The variational bound on -log p(x_0), summed over all timesteps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, DenoiseFn, Float, Image, Int, Label, PerExample
from fooddiff.diffusion.losses import bound_term, prior_term
from fooddiff.diffusion.process import GaussianDiffusion, eps_from_x0, q_sample
from fooddiff.diffusion.reverse import Parameterization, reverse_gaussian


class Likelihood(NamedTuple):
    """The bound and its parts."""

    total: PerExample  # bits/dim: prior + the sum of vb
    prior: PerExample  # bits/dim
    vb: Float[Array, "n T"]  # bits/dim per timestep
    x0_mse: Float[Array, "n T"]  # squared error of the predicted x_0
    eps_mse: Float[Array, "n T"]  # squared error of the eps that belongs to it


def bits_per_dim(
    process: GaussianDiffusion, param: Parameterization, denoise: DenoiseFn,
    x_0: Image, noise: Callable[[Int[Array, ""]], Image], y: Label | None, *, clip: bool = True,
) -> Likelihood:  # fmt: skip
    """Evaluates the bound of IDDPM eq. 4 to 7 with one draw of noise per timestep.

    Args:
        process: the process.
        param: what the network predicts.
        denoise: the network.
        x_0: [n, h, w, c], 8-bit images scaled to [-1, 1].
        noise: gives the standard normal noise of timestep t (a traced scalar), in the shape of x_0.
        y: i32[n] labels, or None.
        clip: clip the predicted x_0 to [-1, 1].

    Returns:
        The bound in bits/dim and its terms.
    """

    def term(_, t):
        t_batch = jnp.full(x_0.shape[:1], t)
        eps = noise(t)
        x_t = q_sample(process, x_0, t_batch, eps)
        out = denoise(x_t, process.model_timesteps[t_batch], y)
        vb = bound_term(process, param, out, x_0, x_t, t_batch, clip=clip)
        predicted = reverse_gaussian(process, param, out, x_t, t_batch, clip=clip).x_0
        eps_error = eps_from_x0(process, predicted, x_t, t_batch) - eps
        return None, (vb, ((predicted - x_0) ** 2).mean((1, 2, 3)), (eps_error**2).mean((1, 2, 3)))

    _, terms = jax.lax.scan(term, None, jnp.arange(process.num_timesteps))
    vb, x0_mse, eps_mse = (jnp.moveaxis(term, 0, 1) for term in terms)
    prior = prior_term(process, x_0)
    return Likelihood(prior + vb.sum(axis=1), prior, vb, x0_mse, eps_mse)
