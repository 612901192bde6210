"""One optimizer step as a pure function. Knows no diffusion: the objective is an argument."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from fooddiff.arrays import Batch, Key, Params, PyTree
from fooddiff.keys import stream
from fooddiff.train.objective import Examples, Objective
from fooddiff.train.state import TrainState
from fooddiff.xla import unroll_gradients

StepFn = Callable[[TrainState, Batch, Key], TrainState]


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, *, ema_warmup: bool, accumulate: int = 1
) -> StepFn:
    """Builds the step (state, batch, key) -> state.

    Randomness of step k is a function of (key, k). A gradient that is not finite, or an update that would make the
    parameters so, leaves parameters, averages, optimizer and timestep history as they were and is counted; the step
    still counts, so that the next batch is another one.

    Args:
        objective: the loss.
        optimizer: the optimizer.
        ema_warmup: average with min(rate, (1 + k) / (10 + k)) at step k, so that early averages forget the
            initial parameters.
        accumulate: microbatches per step, whose gradients are averaged; divides the batch size.

    Returns:
        A function to be jitted with the state donated. Metrics add up in `state.sums`.
    """

    def train_step(state: TrainState, batch: Batch, key: Key) -> TrainState:
        key = stream(key, "step", state.step)
        examples = objective.draw(state.history, batch, key)
        grads, terms = mean_gradient(objective, state.params, examples, stream(key, "dropout"), accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        history, sums = objective.observe(state.history, examples, terms)
        grad_norm = optax.tree.norm(grads)
        norms = {
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        sums = dict(sums) | {name: jnp.stack([norm, jnp.ones(())]) for name, norm in norms.items()}

        decay = (1 + state.step) / (10 + state.step) if ema_warmup else 1.0
        updated = TrainState(
            step=state.step,
            params=params,
            ema={rate: lerp(ema, params, 1 - jnp.minimum(float(rate), decay)) for rate, ema in state.ema.items()},
            opt_state=opt_state,
            history=history,
            sums=jax.tree.map(jnp.add, state.sums, sums),
            skipped=jnp.zeros_like(state.skipped),
            skipped_total=state.skipped_total,
        )
        unchanged = replace(state, skipped=state.skipped + 1, skipped_total=state.skipped_total + 1)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(norms["param_norm"])
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, unchanged)
        return replace(state, step=state.step + 1)

    return train_step


def make_diagnosis(objective: Objective, *, accumulate: int) -> Callable[[TrainState, Batch, Key], dict[str, PyTree]]:
    """Builds a function that computes a skipped step again and keeps what the step throws away.

    Args:
        objective: the loss.
        accumulate: microbatches per step.

    Returns:
        A function (state after the step, its batch, key) -> whether every "parameters" and "gradients" tensor is
        finite, and for every example whether its "losses" are, all in the order in which a step computes them.
    """

    def diagnose(state: TrainState, batch: Batch, key: Key) -> dict[str, PyTree]:
        key = stream(key, "step", state.step - 1)
        examples = objective.draw(state.history, batch, key)
        grads, terms = mean_gradient(objective, state.params, examples, stream(key, "dropout"), accumulate)
        every = functools.partial(jax.tree.map, lambda tensor: jnp.isfinite(tensor).all())
        return {"parameters": every(state.params), "losses": jnp.isfinite(terms.total), "gradients": every(grads)}

    return diagnose


def mean_gradient(
    objective: Objective, params: Params, examples: Examples, key: Key, accumulate: int
) -> tuple[Params, PyTree]:
    """Gradient of the mean loss, computed in `accumulate` microbatches to save memory.

    Microbatch j takes examples j, j + accumulate, ..., which keeps the batch axis split evenly over devices.

    Returns:
        The gradient, and what the loss reports of every example, in batch order.
    """
    gradient = jax.grad(objective.loss, has_aux=True)
    if accumulate == 1:
        return gradient(params, examples, key)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

    def merge(x):
        return jnp.moveaxis(x, 0, 1).reshape(-1)

    def add(total, item):
        index, microbatch = item
        grads, terms = gradient(params, microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(lambda a, b: a + b / accumulate, total, grads), terms

    zeros = jax.tree.map(jnp.zeros_like, params)
    microbatches = (jnp.arange(accumulate), jax.tree.map(split, examples))
    grads, terms = jax.lax.scan(add, zeros, microbatches, unroll=unroll_gradients())
    return grads, jax.tree.map(merge, terms)


def lerp(start: Params, end: Params, weight: jax.Array) -> Params:
    """Start + weight * (end - start), leaf by leaf."""
    return jax.tree.map(lambda a, b: a + weight * (b - a), start, end)
