"""Sampling: from noise to images along given levels.

A `Sampler` is (denoise, steps, x_T, noise, cond) -> x_0. It owns its scan over the steps and calls the denoiser as
often as it likes. `noise` gives the standard normal noise of a step, named by how many steps follow it. Keyword
settings are bound with functools.partial.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Cond, Image, Int
from fooddiff.diffusion.denoiser import Denoiser, Prediction
from fooddiff.diffusion.guidance import Gradient
from fooddiff.diffusion.level import Level, Transition, add_noise, for_batch, per_image, q_posterior

Noise: TypeAlias = Callable[[Int[Array, ""]], Image]
Sampler: TypeAlias = Callable[[Denoiser, Transition, Image, Noise, Cond], Image]
Step: TypeAlias = Callable[[Image, Any, Transition], tuple[Image, Any]]
"""(x_t, what the step before has left, step) -> (x_next, left to the next)."""

MAX_CHURN = 2**0.5 - 1  # EDM algorithm 2: the largest share by which noise is raised


def descend(step: Step, steps: Transition, x_T: Image, left: Any = None) -> tuple[Image, Any]:
    """Applies a step to all of `steps`, the noisiest first, as one `lax.scan`."""

    def body(carry, here):
        return step(*carry, for_batch(here, len(x_T))), None

    carry, _ = jax.lax.scan(body, (x_T, left), steps)
    return carry


def ancestral(
    denoise: Denoiser, steps: Transition, x_T: Image, noise: Noise, cond: Cond, *, gradient: Gradient | None = None
) -> Image:
    """Draws x_next ~ p(x_next | x_t) at every step (DDPM algorithm 2); the last step returns the mean.

    With the gradient of a classifier, every mean is moved by the variance times it (Dhariwal, Nichol 2021, arXiv
    2105.05233, algorithm 1).
    """

    def step(x_t, left, here):
        prediction = denoise(x_t, here.level, cond)
        pull = None if gradient is None else gradient(x_t, here.level, cond)
        return ancestral_step(prediction, x_t, here, noise(here.remaining[0]), pull=pull), left

    return descend(step, steps, x_T)[0]


def ancestral_step(
    prediction: Prediction, x_t: Image, here: Transition, noise: Image, *, pull: Image | None = None
) -> Image:
    """Draws from the posterior at the predicted x_0, with the model's variance or, without one, the posterior's."""
    mean, log_var = q_posterior(here, prediction.x_0, x_t)
    log_var = log_var if prediction.log_var is None else prediction.log_var
    if pull is not None:
        mean = mean + jnp.exp(log_var) * pull
    return mean + _unless_last(here) * jnp.exp(0.5 * log_var) * noise


def ddim(
    denoise: Denoiser, steps: Transition, x_T: Image, noise: Noise, cond: Cond, *, eta: float = 0.0
) -> Image:  # fmt: skip
    """DDIM (DDIM eq. 12). A modelled variance is not used.

    Args:
        denoise: the denoiser.
        steps: the steps.
        x_T: standard normal, [n, h, w, c].
        noise: of each step; has no effect when eta is 0.
        cond: conditions.
        eta: 0 is deterministic, 1 has the variance of the posterior (DDIM eq. 16).

    Returns:
        x_0, [n, h, w, c].
    """

    def step(x_t, left, here):
        prediction = denoise(x_t, here.level, cond)
        return ddim_step(prediction, x_t, here, noise(here.remaining[0]), eta=eta), left

    return descend(step, steps, x_T)[0]


def ddim_step(prediction: Prediction, x_t: Image, here: Transition, noise: Image, *, eta: float = 0.0) -> Image:
    """One step of `ddim`; with eta = 0 it also leads to a level of more noise, which encodes an image."""
    deviation = eta * (here.remaining != 0) * jnp.exp(0.5 * here.posterior_log_var)
    kept = jnp.sqrt(here.next.sigma**2 - deviation**2)
    mean = per_image(here.next.alpha) * prediction.x_0 + per_image(kept) * prediction.eps
    return mean + per_image(deviation) * noise


def dpmpp_2m(denoise: Denoiser, steps: Transition, x_T: Image, noise: Noise, cond: Cond) -> Image:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), of second order in the step.

    It is exact where x_0 is linear in lambda = log(alpha / sigma), half the log SNR. The first step, which has none
    before it, and the last one, which ends at lambda = infinity, take x_0 as constant; that is DDIM with eta = 0. It
    solves the deterministic ODE: a modelled variance and the noise are not used.
    """

    def step(x_t, before, here):
        x_0 = denoise(x_t, here.level, cond).x_0
        ahead = x_0 + _slope(before, here) * (x_0 - before[0])
        decay = here.next.sigma / here.level.sigma
        drift = here.next.alpha - here.level.alpha * decay
        return per_image(decay) * x_t + per_image(drift) * ahead, (x_0, here.level.log_snr)

    return descend(step, steps, x_T, _nothing_before(x_T))[0]


def sde_dpmpp_2m(denoise: Denoiser, steps: Transition, x_T: Image, noise: Noise, cond: Cond) -> Image:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, section 5): `ancestral` of second order in the step.

    Where there is one prediction, at the first and the last step, it draws from the posterior itself.
    """

    def step(x_t, before, here):
        prediction = denoise(x_t, here.level, cond)
        ahead = prediction.x_0 + _slope(before, here) * (prediction.x_0 - before[0])
        x_next = ancestral_step(Prediction(ahead, prediction.eps, None), x_t, here, noise(here.remaining[0]))
        return x_next, (prediction.x_0, here.level.log_snr)

    return descend(step, steps, x_T, _nothing_before(x_T))[0]


def heun(
    denoise: Denoiser, steps: Transition, x_T: Image, noise: Noise, cond: Cond, *,
    churn: float = 0.0, level_of: Callable[[Array], Level] | None = None,
) -> Image:  # fmt: skip
    """Heun's method, of second order, with two calls of the denoiser a step and one in the last (EDM algorithm 2).

    Args:
        denoise: the denoiser. A modelled variance is not used.
        steps: the steps.
        x_T: standard normal, [n, h, w, c].
        noise: of each step; has no effect when churn is 0.
        cond: conditions.
        churn: 0 solves the deterministic ODE; above, every step but the last first adds noise, which raises the
            noise-to-signal ratio by this share (EDM's gamma), at most 2^1/2 - 1.
        level_of: the level of a log SNR; needed for churn.

    Returns:
        x_0, [n, h, w, c].
    """

    def step(x_t, left, here):
        level, after = here.level, here.next
        if churn:
            raised = level_of(level.log_snr - 2 * jnp.log1p(churn))
            fresh = jnp.sqrt(raised.noise_to_signal**2 - level.noise_to_signal**2)
            x_t = per_image(raised.alpha) * (
                per_image(level.inv_alpha) * x_t + per_image(fresh) * noise(here.remaining[0])
            )
            level = raised
        x_0, eps, _ = denoise(x_t, level, cond)
        _, eps_after, _ = denoise(add_noise(after, x_0, eps), after, cond)
        # in EDM's coordinates, x / alpha moves along eps by the difference of noise-to-signal ratios
        moved = per_image(after.noise_to_signal - level.noise_to_signal) * (eps + eps_after) / 2
        return per_image(after.alpha) * (per_image(level.inv_alpha) * x_t + moved), left

    x_t, _ = descend(step, jax.tree.map(lambda field: field[:-1], steps), x_T)
    last = for_batch(jax.tree.map(lambda field: field[-1], steps), len(x_T))
    return denoise(x_t, last.level, cond).x_0


def _nothing_before(x_T: Image) -> tuple[Image, Array]:
    return jnp.zeros_like(x_T), jnp.full((len(x_T),), -jnp.inf)


def _slope(before: tuple[Image, Array], here: Transition) -> Array:
    """Half the ratio of this step to the last one in lambda; 0 at the first and the last step, which have no ratio."""
    log_snr, before_log_snr = here.level.log_snr, before[1]
    inner = jnp.isfinite(before_log_snr) & jnp.isfinite(here.next.log_snr)
    step, last = (jnp.where(inner, a - b, 1.0) for a, b in ((here.next.log_snr, log_snr), (log_snr, before_log_snr)))
    return per_image(jnp.where(inner, step / (2 * last), 0.0))


def _unless_last(here: Transition) -> Array:
    """1 where the step adds noise, 0 at the last."""
    return per_image((here.remaining != 0).astype(jnp.float32))
