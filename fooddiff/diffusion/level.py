"""Levels of noise and the steps between them, as values: what a process looks like to everything that uses one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Float, Image, Int, PerExample


class Level(NamedTuple):
    """How noisy an image is: x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, one number per example.

    What follows from alpha and sigma is a field where float32 would lose digits by computing it again.
    """

    alpha: Float[Array, " n"]
    sigma: Float[Array, " n"]
    inv_alpha: Float[Array, " n"]  # 1 / alpha
    noise_to_signal: Float[Array, " n"]  # sigma / alpha, the sigma of EDM
    log_snr: Float[Array, " n"]  # log(alpha^2 / sigma^2)
    network_time: Float[Array, " n"]  # what the network is fed
    index: Int[Array, " n"] | None = None  # of a discrete process: 0 has the least noise
    log_var_range: tuple[Float[Array, " n"], Float[Array, " n"]] | None = None
    """Of a discrete process: the log variances of the step that leaves this level, the posterior's own and log beta."""


class Transition(NamedTuple):
    """One step of the reverse process per example or, stacked and noisiest first, all the steps of a sampling run."""

    level: Level
    next: Level  # where the step leads, with less noise; the last one leads to x_0 itself
    posterior_coef_x0: Float[Array, " n"]  # mean of q(x_next | x_level, x_0) = coef_x0 x_0 + coef_xt x_level
    posterior_coef_xt: Float[Array, " n"]
    posterior_log_var: Float[Array, " n"]
    remaining: Int[Array, " n"]  # steps that follow: 0 is the last one, which adds no noise


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images."""

    mean: Image
    log_var: Float[Array, "n 1 1 1"] | Image


def clean_level() -> Level:
    """The level of x_0 itself. No network is called here."""
    one, zero = jnp.ones(()), jnp.zeros(())
    return Level(one, zero, one, zero, jnp.full((), jnp.inf), zero)


def per_image(numbers: PerExample) -> Float[Array, "n 1 1 1"]:
    """Shapes one number per example to broadcast over images."""
    return numbers[:, None, None, None]


def for_batch(steps: Transition, n: int) -> Transition:
    """Gives every example of a batch the same step: fields of shape [] become [n]."""
    return jax.tree.map(lambda number: jnp.full((n,), number), steps)


def add_noise(level: Level, x_0: Image, eps: Image) -> Image:
    """Draws x_t ~ q(x_t | x_0) with the given standard normal `eps` (DDPM eq. 4)."""
    return per_image(level.alpha) * x_0 + per_image(level.sigma) * eps


def x0_from_eps(level: Level, eps: Image, x_t: Image) -> Image:
    """Solves DDPM eq. 4 for x_0."""
    return per_image(level.inv_alpha) * x_t - per_image(level.noise_to_signal) * eps


def eps_from_x0(level: Level, x_0: Image, x_t: Image) -> Image:
    """Solves DDPM eq. 4 for eps."""
    return (per_image(level.inv_alpha) * x_t - x_0) / per_image(level.noise_to_signal)


def q_posterior(step: Transition, x_0: Image, x_t: Image) -> Gaussian:
    """The posterior q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7).

    At the last step of a discrete process its variance is zero; `log_var` then holds the value of the step before, as
    in the reference.
    """
    mean = per_image(step.posterior_coef_x0) * x_0 + per_image(step.posterior_coef_xt) * x_t
    return Gaussian(mean, per_image(step.posterior_log_var))
