"""Guidance: denoisers made of denoisers, and the pull of a classifier."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Cond, Image, PerExample
from fooddiff.diffusion.denoiser import Denoiser, Prediction
from fooddiff.diffusion.level import Level, eps_from_x0, per_image, x0_from_eps

LogProb: TypeAlias = Callable[[Image, Level, Cond], PerExample]
"""(x_t, level, cond) -> log p(y | x_t) of a classifier of noisy images, at the labels of cond."""

Gradient: TypeAlias = Callable[[Image, Level, Cond], Image]
"""(x_t, level, cond) -> what to add to the score of x_t."""


def unconditional(denoise: Denoiser, null_label: int) -> Denoiser:
    """The same network without knowledge of the class: every label is the null label."""

    def without_label(x_t: Image, level: Level, cond: Cond) -> Prediction:
        return denoise(x_t, level, {**cond, "y": jnp.full_like(cond["y"], null_label)})

    return without_label


def guided(
    denoise: Denoiser, guide: Denoiser, *, scale: float | Array, interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Denoiser:  # fmt: skip
    """Goes on from what a guide predicts through what the denoiser predicts: guide + scale (denoise - guide).

    With the unconditional denoiser as the guide this is classifier-free guidance (Ho, Salimans 2022, arXiv 2207.12598;
    their w is scale - 1), with a weaker model's it is autoguidance (Karras et al. 2024, arXiv 2406.02507). The
    variance is the denoiser's own.

    A large scale multiplies rounding. eps is extrapolated and x_0 follows from it, so that both have the same share of
    it, which a step hardly sees.

    Args:
        denoise: the denoiser.
        guide: what to move away from.
        scale: 1 is the denoiser alone, 0 the guide alone. Not 1, which would be a call for nothing.
        interval: log SNRs (low, high) between which to guide; elsewhere the guide is not called (Kynkäänniemi et al.
            2024, arXiv 2404.07724). None guides everywhere. All examples of a batch must be at the same level.
        rescale: share, in [0, 1], by which the deviation of the guided x_0 over each image is brought back to that of
            the denoiser's own (Lin et al. 2023, arXiv 2305.08891, section 3.4, there 0.7).

    Returns:
        The guided denoiser.
    """

    def extrapolate(x_t: Image, level: Level, cond: Cond) -> Prediction:
        ours, theirs = denoise(x_t, level, cond), guide(x_t, level, cond)
        eps = theirs.eps + scale * (ours.eps - theirs.eps)
        x_0 = x0_from_eps(level, eps, x_t)
        if rescale:
            deviation = ours.x_0.std(axis=(1, 2, 3), keepdims=True) / x_0.std(axis=(1, 2, 3), keepdims=True)
            x_0 = x_0 * (rescale * deviation + 1 - rescale)
            eps = eps_from_x0(level, x_0, x_t)
        return Prediction(x_0, eps, ours.log_var)

    def within_interval(x_t: Image, level: Level, cond: Cond) -> Prediction:
        low, high = interval
        log_snr = level.log_snr[0]
        return jax.lax.cond((low <= log_snr) & (log_snr <= high), extrapolate, denoise, x_t, level, cond)

    return extrapolate if interval is None else within_interval


def classifier_gradient(log_prob: LogProb, scale: float) -> Gradient:
    """The gradient of log p(y | x_t) in x_t, times a scale (Dhariwal, Nichol 2021, arXiv 2105.05233, section 4).

    The ancestral sampler moves its mean by it (their algorithm 1); all others are given a denoiser whose score has
    it, `classifier_guided`.
    """

    def gradient(x_t: Image, level: Level, cond: Cond) -> Image:
        return scale * jax.grad(lambda x: log_prob(x, level, cond).sum())(x_t)

    return gradient


def without_last(gradient: Gradient) -> Gradient:
    """No pull at the last timestep of a discrete process, where the posterior's own variance is zero."""

    def unless_last(x_t: Image, level: Level, cond: Cond) -> Image:
        return per_image((level.index != 0).astype(jnp.float32)) * gradient(x_t, level, cond)

    return unless_last


def classifier_guided(denoise: Denoiser, gradient: Gradient) -> Denoiser:
    """Adds a gradient to the score of a denoiser: eps - sigma gradient (Dhariwal, Nichol 2021, algorithm 2).

    As in the reference it works on a denoiser that is clipped already, and what comes of it is not clipped again.
    """

    def pulled(x_t: Image, level: Level, cond: Cond) -> Prediction:
        prediction = denoise(x_t, level, cond)
        eps = prediction.eps - per_image(level.sigma) * gradient(x_t, level, cond)
        return prediction._replace(x_0=x0_from_eps(level, eps, x_t), eps=eps)

    return pulled
