"""Discrete variance-preserving diffusion with T steps: its tables, and its levels and transitions looked up in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fooddiff.arrays import Array, Float, Int, Timestep
from fooddiff.diffusion.level import Level, Transition, clean_level


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GaussianDiffusion:
    """The tables of a discrete variance-preserving process with T steps.

    Index t = 0 is the step with the least noise; x_{-1} means the clean image x_0.
    """

    timesteps: Int[Array, " T"]  # index of each kept step in the original process
    model_timesteps: Float[Array, " T"]  # what the network is fed for each step
    log_beta: Float[Array, " T"]
    sqrt_alpha_bar: Float[Array, " T"]
    sqrt_one_minus_alpha_bar: Float[Array, " T"]
    sqrt_recip_alpha_bar: Float[Array, " T"]  # (1 / alpha_bar)^1/2
    sqrt_recipm1_alpha_bar: Float[Array, " T"]  # (1 / alpha_bar - 1)^1/2
    log_snr: Float[Array, " T"]
    posterior_coef_x0: Float[Array, " T"]  # DDPM eq. 7
    posterior_coef_xt: Float[Array, " T"]
    posterior_log_var: Float[Array, " T"]  # t = 0 takes the value of t = 1, since its variance is 0

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps that are kept."""
        return self.timesteps.shape[0]


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
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(1 - alpha_bar),
        sqrt_recip_alpha_bar=np.sqrt(1 / alpha_bar),
        sqrt_recipm1_alpha_bar=np.sqrt(1 / alpha_bar - 1),
        log_snr=np.log(alpha_bar) - np.log(1 - alpha_bar),
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


def level_at(process: GaussianDiffusion, t: Timestep) -> Level:
    """Looks up the levels of timesteps, i32 of any shape; t = -1 is x_0 itself."""
    level = Level(
        alpha=process.sqrt_alpha_bar[t],
        sigma=process.sqrt_one_minus_alpha_bar[t],
        inv_alpha=process.sqrt_recip_alpha_bar[t],
        noise_to_signal=process.sqrt_recipm1_alpha_bar[t],
        log_snr=process.log_snr[t],
        network_time=process.model_timesteps[t],
    )
    level = jax.tree.map(lambda clean, table: jnp.where(t < 0, clean, table), clean_level(), level)
    return level._replace(index=t, log_var_range=(process.posterior_log_var[t], process.log_beta[t]))


def network_time_at(process: GaussianDiffusion, log_snr: Float[Array, " n"]) -> Float[Array, " n"]:
    """What a network of this process is fed at any log SNR: linear between its timesteps, the nearest one beyond them.

    So a network of one process can be asked about the images of another.
    """
    ascending = process.log_snr[::-1]
    return jnp.interp(jnp.clip(log_snr, ascending[0], ascending[-1]), ascending, process.model_timesteps[::-1])


def transition_at(process: GaussianDiffusion, t: Timestep) -> Transition:
    """Looks up the steps from timestep t to t - 1, i32 of any shape."""
    return Transition(
        level=level_at(process, t),
        next=level_at(process, t - 1),
        posterior_coef_x0=process.posterior_coef_x0[t],
        posterior_coef_xt=process.posterior_coef_xt[t],
        posterior_log_var=process.posterior_log_var[t],
        remaining=t,
    )


def transitions(process: GaussianDiffusion) -> Transition:
    """All steps of the reverse process, from t = T - 1 to 0."""
    return transition_at(process, jnp.arange(process.num_timesteps)[::-1])
