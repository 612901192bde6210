"""Sampling: from noise to images along given levels.

A `Sampler` is (denoise, steps, descent, noise, cond) -> descent. It owns its scan over the steps and calls the denoiser
as often as it likes. `noise` gives the standard normal noise of a step, named by how many steps follow it. Keyword
settings are bound with functools.partial. What a sampler returns for some of the steps is what it takes for those that
follow, so that whoever runs it may look at the images in between; after the last step x_t is x_0.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Cond, Float, Image, Int
from fooddiff.diffusion.denoiser import Denoiser, Prediction
from fooddiff.diffusion.guidance import Gradient
from fooddiff.diffusion.level import Level, Transition, add_noise, for_batch, per_image, q_posterior


class Descent(NamedTuple):
    """Where a batch is on its way from noise to images."""

    x_t: Image
    x_0: Image  # what the step before has predicted; zeros where there was none
    log_snr: Float[Array, " n"]  # of the level at which it did; -inf where there was none


Noise: TypeAlias = Callable[[Int[Array, ""]], Image]
Sampler: TypeAlias = Callable[[Denoiser, Transition, Descent, Noise, Cond], Descent]
Step: TypeAlias = Callable[[Descent, Transition], tuple[Image, Image]]
"""(descent, step) -> (x_next, the x_0 that was predicted at x_t)."""

MAX_CHURN = 2**0.5 - 1  # EDM algorithm 2: the largest share by which noise is raised


def begin(x_T: Image) -> Descent:
    """A descent before its first step."""
    return Descent(x_T, jnp.zeros_like(x_T), jnp.full((len(x_T),), -jnp.inf))


def descend(step: Step, steps: Transition, descent: Descent) -> Descent:
    """Applies a step to all of `steps`, the noisiest first, as one `lax.scan`."""

    def body(descent, here):
        here = for_batch(here, len(descent.x_t))
        return Descent(*step(descent, here), here.level.log_snr), None

    return jax.lax.scan(body, descent, steps)[0]


def ancestral(
    denoise: Denoiser,
    steps: Transition,
    descent: Descent,
    noise: Noise,
    cond: Cond,
    *,
    gradient: Gradient | None = None,
) -> Descent:
    """Draws x_next ~ p(x_next | x_t) at every step (DDPM algorithm 2); the last step returns the mean.

    With the gradient of a classifier, every mean is moved by the variance times it (Dhariwal, Nichol 2021, arXiv
    2105.05233, algorithm 1).
    """

    def step(at, here):
        prediction = denoise(at.x_t, here.level, cond)
        pull = None if gradient is None else gradient(at.x_t, here.level, cond)
        return ancestral_step(prediction, at.x_t, here, noise(here.remaining[0]), pull=pull), prediction.x_0

    return descend(step, steps, descent)


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
    denoise: Denoiser, steps: Transition, descent: Descent, noise: Noise, cond: Cond, *, eta: float = 0.0
) -> Descent:  # fmt: skip
    """DDIM (DDIM eq. 12). A modelled variance is not used.

    Args:
        denoise: the denoiser.
        steps: the steps.
        descent: where they begin.
        noise: of each step; has no effect when eta is 0.
        cond: conditions.
        eta: 0 is deterministic, 1 has the variance of the posterior (DDIM eq. 16).

    Returns:
        Where they end.
    """

    def step(at, here):
        prediction = denoise(at.x_t, here.level, cond)
        return ddim_step(prediction, at.x_t, here, noise(here.remaining[0]), eta=eta), prediction.x_0

    return descend(step, steps, descent)


def ddim_step(prediction: Prediction, x_t: Image, here: Transition, noise: Image, *, eta: float = 0.0) -> Image:
    """One step of `ddim`; with eta = 0 it also leads to a level of more noise, which encodes an image."""
    deviation = eta * (here.remaining != 0) * jnp.exp(0.5 * here.posterior_log_var)
    kept = jnp.sqrt(jnp.maximum(here.next.sigma**2 - deviation**2, 0.0))  # rounding may bring it below 0
    mean = per_image(here.next.alpha) * prediction.x_0 + per_image(kept) * prediction.eps
    return mean + per_image(deviation) * noise


def dpmpp_2m(denoise: Denoiser, steps: Transition, descent: Descent, noise: Noise, cond: Cond) -> Descent:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), of second order in the step.

    It is exact where x_0 is linear in lambda = log(alpha / sigma), half the log SNR. The first step, which has none
    before it, and the last one, which ends at lambda = infinity, take x_0 as constant; that is DDIM with eta = 0. It
    solves the deterministic ODE: a modelled variance and the noise are not used.
    """

    def step(at, here):
        x_0 = denoise(at.x_t, here.level, cond).x_0
        ahead = x_0 + _slope(at, here) * (x_0 - at.x_0)
        decay = here.next.sigma / here.level.sigma
        drift = here.next.alpha - here.level.alpha * decay
        return per_image(decay) * at.x_t + per_image(drift) * ahead, x_0

    return descend(step, steps, descent)


def sde_dpmpp_2m(denoise: Denoiser, steps: Transition, descent: Descent, noise: Noise, cond: Cond) -> Descent:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, section 5): `ancestral` of second order in the step.

    Where there is one prediction, at the first and the last step, it draws from the posterior itself.
    """

    def step(at, here):
        prediction = denoise(at.x_t, here.level, cond)
        ahead = prediction.x_0 + _slope(at, here) * (prediction.x_0 - at.x_0)
        x_next = ancestral_step(Prediction(ahead, prediction.eps, None), at.x_t, here, noise(here.remaining[0]))
        return x_next, prediction.x_0

    return descend(step, steps, descent)


def heun(
    denoise: Denoiser, steps: Transition, descent: Descent, noise: Noise, cond: Cond, *,
    churn: float = 0.0, level_of: Callable[[Array], Level] | None = None,
) -> Descent:  # fmt: skip
    """Heun's method, of second order, with two calls of the denoiser a step and one in the last (EDM algorithm 2).

    Args:
        denoise: the denoiser. A modelled variance is not used.
        steps: the steps.
        descent: where they begin.
        noise: of each step; has no effect when churn is 0.
        cond: conditions.
        churn: 0 solves the deterministic ODE; above, every step but the last first adds noise, which raises the
            noise-to-signal ratio by this share (EDM's gamma), at most 2^1/2 - 1.
        level_of: the level of a log SNR; needed for churn.

    Returns:
        Where they end.
    """

    def inner(x_t, here):
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
        return per_image(after.alpha) * (per_image(level.inv_alpha) * x_t + moved), x_0

    def last(x_t, here):
        x_0 = denoise(x_t, here.level, cond).x_0
        return x_0, x_0

    def step(at, here):
        return jax.lax.cond(here.remaining[0] == 0, last, inner, at.x_t, here)

    return descend(step, steps, descent)


def _slope(before: Descent, here: Transition) -> Array:
    """Half the ratio of this step to the last one in lambda; 0 where there is none.

    That is at the first and the last step, and where a level repeats the one before it.
    """
    log_snr = here.level.log_snr
    inner = jnp.isfinite(before.log_snr) & jnp.isfinite(here.next.log_snr) & (log_snr != before.log_snr)
    pairs = ((here.next.log_snr, log_snr), (log_snr, before.log_snr))
    step, last = (jnp.where(inner, a - b, 1.0) for a, b in pairs)
    return per_image(jnp.where(inner, step / (2 * last), 0.0))


def _unless_last(here: Transition) -> Array:
    """1 where the step adds noise, 0 at the last."""
    return per_image((here.remaining != 0).astype(jnp.float32))
