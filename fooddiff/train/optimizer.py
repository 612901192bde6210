"""Optimizers and learning rates as tables of functions."""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
import optax

from fooddiff.arrays import Array, Float, Int, Params

LearningRate: TypeAlias = Callable[[Int[Array, ""]], Float[Array, ""]]


def warmed_up(lr: float, warmup_steps: int, shape: LearningRate) -> LearningRate:
    """`lr` times a shape, after a linear warm-up over some steps."""

    def learning_rate(count):
        return lr * jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1)) * shape(count)

    return learning_rate


def constant(count: Int[Array, ""]) -> Float[Array, ""]:
    """1."""
    return jnp.ones(())


def linear_to_zero(start: int, end: int) -> LearningRate:
    """1 until step `start`, then linearly to zero at step `end`."""

    def shape(count):
        return jnp.clip(1 - (count - start) / (end - start), 0.0, 1.0)

    return shape


def inverse_sqrt(start: int) -> LearningRate:
    """1 until step `start`, then (start / step)^1/2 (Karras et al. 2024, arXiv 2312.02696, eq. 67)."""

    def shape(count):
        return 1 / jnp.sqrt(jnp.maximum(count / start, 1.0))

    return shape


def adam(learning_rate: LearningRate, *, b1: float, b2: float) -> optax.GradientTransformation:
    """Adam (Kingma, Ba 2015)."""
    return optax.adam(learning_rate, b1=b1, b2=b2)


def adamw(
    learning_rate: LearningRate, *, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:  # fmt: skip
    """AdamW (Loshchilov, Hutter 2019)."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)


def muon(
    learning_rate: LearningRate, *, b1: float, b2: float, weight_decay: float, matrix_lr_ratio: float = 10.0
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for matrices and convolutions, AdamW for the rest.

    A convolution's kernel [h, w, in, out] is treated as the matrix [h w in, out].

    Args:
        learning_rate: of AdamW.
        b1: AdamW's, and Muon's momentum.
        b2: AdamW's.
        weight_decay: of both.
        matrix_lr_ratio: Muon's learning rate as a multiple of AdamW's.

    Returns:
        The optimizer.
    """

    def dimensions(params: Params) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
        inputs = {2: (0,), 4: (0, 1, 2)}  # axes of a matrix and of a convolution that come in
        return {
            name: optax.contrib.MuonDimensionNumbers(inputs[leaf.ndim], leaf.ndim - 1)
            if name.endswith("kernel") and not isinstance(leaf, optax.MaskedNode) and leaf.ndim in inputs
            else None
            for name, leaf in params.items()
        }

    return optax.contrib.muon(
        lambda count: matrix_lr_ratio * learning_rate(count),
        beta=b1,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=weight_decay,
        adam_learning_rate=learning_rate,
        muon_weight_dimension_numbers=dimensions,
    )
