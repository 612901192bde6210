"""What one training step minimises: draws timesteps and noise for a batch, and reduces the loss terms.

The only module of this package that knows diffusion.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fooddiff.arrays import Array, Batch, Float, Image, Key, Label, Params, PerExample, Scalar, Timestep
from fooddiff.data.preprocess import to_signed
from fooddiff.diffusion.losses import LossTerms
from fooddiff.diffusion.timesteps import (
    LossHistory,
    empty_history,
    sample_t,
    second_moment_probs,
    uniform_probs,
    update_history,
)
from fooddiff.keys import stream
from fooddiff.model.network import Network

Sums = Mapping[str, Float[Array, "2"]]
"""Metrics as (sum, count), so that they add up over steps and microbatches."""


class Examples(NamedTuple):
    """A batch with everything random already drawn; can be split along n without changing any number."""

    x_0: Image
    t: Timestep
    weight: PerExample  # importance weight of t
    eps: Image
    y: Label | None


class Objective(NamedTuple):
    """The loss as pure functions; `LossHistory | None` is the state that a timestep sampler carries along."""

    init: Callable[[], LossHistory | None]
    draw: Callable[[LossHistory | None, Batch, Key], Examples]
    loss: Callable[[Params, Examples, Key], tuple[Scalar, LossTerms]]
    observe: Callable[[LossHistory | None, Examples, LossTerms], tuple[LossHistory | None, Sums]]


def make_objective(
    network: Network,
    loss_terms: Callable[..., LossTerms],
    num_timesteps: int,
    *,
    conditional: bool,
    dropout: bool,
    importance_sampling: bool,
) -> Objective:
    """Builds the objective of a diffusion model.

    Args:
        network: the denoiser.
        loss_terms: (denoise, x_0, t, eps, y) -> LossTerms.
        num_timesteps: T.
        conditional: whether the network sees labels.
        dropout: whether the network gets a dropout key.
        importance_sampling: draw t by the second moment of past losses (IDDPM section 3.3) instead of uniformly.

    Returns:
        The objective.
    """

    def init():
        return empty_history(num_timesteps) if importance_sampling else None

    def draw(history, batch, key):
        n = batch.y.shape[0]
        probs = second_moment_probs(history) if importance_sampling else uniform_probs(num_timesteps)
        t, weight = sample_t(stream(key, "t"), n, probs)
        eps = jax.random.normal(stream(key, "eps"), batch.pixels.shape)
        return Examples(to_signed(batch.pixels), t, weight, eps, batch.y if conditional else None)

    def loss(params, examples, key):
        def denoise(x_t, t, y):
            return network.apply(params, x_t, t, y, dropout_key=key if dropout else None)

        terms = loss_terms(denoise, examples.x_0, examples.t, examples.eps, examples.y)
        return (examples.weight * terms.total).mean(), terms

    def observe(history, examples, terms):
        weighted = LossTerms(*(examples.weight * term for term in terms))
        n = jnp.full((), examples.t.shape[0], jnp.float32)
        sums = {
            "loss": jnp.stack([weighted.total.sum(), n]),
            "mse": jnp.stack([weighted.mse.sum(), n]),
            "vb": jnp.stack([weighted.vb.sum(), n]),
        }
        quarter = examples.t * 4 // num_timesteps
        for i in range(4):
            inside = (quarter == i).astype(jnp.float32)
            sums[f"loss_q{i + 1}"] = jnp.stack([(inside * terms.total).sum(), inside.sum()])
        if importance_sampling:
            history = update_history(history, examples.t, terms.total)
        return history, sums

    return Objective(init, draw, loss, observe)
