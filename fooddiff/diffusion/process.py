"""The forward process q: its tables, q(x_t | x_0) and the posterior q(x_{t-1} | x_t, x_0)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fooddiff.arrays import Array, Float, Image, Int, Timestep


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GaussianDiffusion:
    """The tables of a discrete variance-preserving process with T steps.

    Index t = 0 is the step with the least noise; x_{-1} means the clean image x_0.
    """

    timesteps: Int[Array, " T"]  # index of each kept step in the original process
    model_timesteps: Float[Array, " T"]  # what the network is fed for each step
    log_beta: Float[Array, " T"]
    alpha_bar: Float[Array, " T"]
    alpha_bar_prev: Float[Array, " T"]  # alpha_bar[t-1], 1 at t = 0
    alpha_bar_next: Float[Array, " T"]  # alpha_bar[t+1], 0 at t = T-1
    sqrt_alpha_bar: Float[Array, " T"]
    sqrt_one_minus_alpha_bar: Float[Array, " T"]
    log_one_minus_alpha_bar: Float[Array, " T"]
    sqrt_recip_alpha_bar: Float[Array, " T"]  # (1 / alpha_bar)^1/2
    sqrt_recipm1_alpha_bar: Float[Array, " T"]  # (1 / alpha_bar - 1)^1/2
    posterior_coef_x0: Float[Array, " T"]  # DDPM eq. 7
    posterior_coef_xt: Float[Array, " T"]
    posterior_log_var: Float[Array, " T"]  # t = 0 takes the value of t = 1, since its variance is 0

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps that are kept."""
        return self.timesteps.shape[0]


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images."""

    mean: Image
    log_var: Float[Array, "n 1 1 1"] | Image


def make_tables(
    betas: np.ndarray, keep: Sequence[int] | None = None, *, rescale_timesteps: bool = True
) -> GaussianDiffusion:
    """Builds the tables of a process in float64 NumPy.

    Args:
        betas: float64[T], each in (0, 1).
        keep: ascending indices of the steps to keep, at least two; None keeps all. The kept process has the same
            marginals q(x_t | x_0) as the original one at those steps (IDDPM eq. 19).
        rescale_timesteps: feed the network t * 1000 / T of the original process instead of t.

    Returns:
        A process whose leaves are NumPy arrays: float64, but int64 for `timesteps` and float32 for `model_timesteps`.

    Raises:
        ValueError: betas outside (0, 1), fewer than two steps, or indices that are not ascending in [0, T).
    """
    original = len(betas)
    kept = np.arange(original) if keep is None else np.asarray(keep)
    if original < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas must be at least two numbers in (0, 1), got {betas}")
    if len(kept) < 2:
        raise ValueError(f"a process needs at least 2 timesteps, got {len(kept)} to keep")
    if kept[0] < 0 or kept[-1] >= original or (np.diff(kept) <= 0).any():
        raise ValueError(f"the timesteps to keep must ascend within 0..{original - 1}, got {list(kept)}")

    kept_alpha_bar = np.cumprod(1 - betas)[kept]
    beta = 1 - kept_alpha_bar / np.append(1.0, kept_alpha_bar[:-1])
    alpha_bar = np.cumprod(1 - beta)  # kept_alpha_bar again but for rounding, which is then the reference's own
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    posterior_var = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return GaussianDiffusion(
        timesteps=kept,
        # a product of two float32 numbers, as in the reference: sin(t) would show the other rounding
        model_timesteps=kept.astype(np.float32) * np.float32(1000 / original if rescale_timesteps else 1),
        log_beta=np.log(beta),
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        alpha_bar_next=np.append(alpha_bar[1:], 0.0),
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(1 - alpha_bar),
        log_one_minus_alpha_bar=np.log(1 - alpha_bar),
        sqrt_recip_alpha_bar=np.sqrt(1 / alpha_bar),
        sqrt_recipm1_alpha_bar=np.sqrt(1 / alpha_bar - 1),
        posterior_coef_x0=beta * np.sqrt(alpha_bar_prev) / (1 - alpha_bar),
        posterior_coef_xt=(1 - alpha_bar_prev) * np.sqrt(1 - beta) / (1 - alpha_bar),
        posterior_log_var=np.log(np.append(posterior_var[1], posterior_var[1:])),
    )


def make_process(
    betas: np.ndarray, keep: Sequence[int] | None = None, *, rescale_timesteps: bool = True
) -> GaussianDiffusion:
    """Builds a process for the device: the tables of `make_tables`, cast once to float32 (int32 for `timesteps`).

    The posterior variance at T = 4000 would lose three digits if it were computed in float32.
    """
    tables = make_tables(betas, keep, rescale_timesteps=rescale_timesteps)
    return jax.tree.map(lambda table: jnp.asarray(table, jnp.int32 if table.dtype.kind == "i" else jnp.float32), tables)


def at(table: Float[Array, " T"], t: Timestep) -> Float[Array, "n 1 1 1"]:
    """Looks up one number per example, shaped to broadcast over images."""
    return table[t][:, None, None, None]


def q_sample(process: GaussianDiffusion, x_0: Image, t: Timestep, eps: Image) -> Image:
    """Draws x_t ~ q(x_t | x_0) with the given standard normal `eps` (DDPM eq. 4)."""
    return at(process.sqrt_alpha_bar, t) * x_0 + at(process.sqrt_one_minus_alpha_bar, t) * eps


def q_marginal(process: GaussianDiffusion, x_0: Image, t: Timestep) -> Gaussian:
    """The marginal q(x_t | x_0) (DDPM eq. 4)."""
    return Gaussian(at(process.sqrt_alpha_bar, t) * x_0, at(process.log_one_minus_alpha_bar, t))


def q_posterior(process: GaussianDiffusion, x_0: Image, x_t: Image, t: Timestep) -> Gaussian:
    """The posterior q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7).

    At t = 0 its variance is zero; `log_var` then holds the value of t = 1, as in the reference.
    """
    mean = at(process.posterior_coef_x0, t) * x_0 + at(process.posterior_coef_xt, t) * x_t
    return Gaussian(mean, at(process.posterior_log_var, t))


def x0_from_eps(process: GaussianDiffusion, eps: Image, x_t: Image, t: Timestep) -> Image:
    """Solves DDPM eq. 4 for x_0."""
    return at(process.sqrt_recip_alpha_bar, t) * x_t - at(process.sqrt_recipm1_alpha_bar, t) * eps


def eps_from_x0(process: GaussianDiffusion, x_0: Image, x_t: Image, t: Timestep) -> Image:
    """Solves DDPM eq. 4 for eps."""
    return (at(process.sqrt_recip_alpha_bar, t) * x_t - x_0) / at(process.sqrt_recipm1_alpha_bar, t)
