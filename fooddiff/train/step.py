"""One optimizer step as a pure function. What is trained is a `Task`."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from fooddiff.arrays import Batch, Key, Params, PyTree
from fooddiff.keys import stream
from fooddiff.train.averages import Decay
from fooddiff.train.state import TrainState
from fooddiff.train.task import Task
from fooddiff.xla import unroll_gradients

StepFn = Callable[[TrainState, Batch, Key], TrainState]


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, averages: Mapping[str, Decay], *, accumulate: int = 1
) -> StepFn:
    """Builds the step (state, batch, key) -> state.

    Randomness of step k is a function of (key, k). A gradient that is not finite, or an update that would make the
    parameters or what the task carries so, leaves parameters, averages, optimizer and what the task carries as they
    were and is counted; the step still counts, so that the next batch is another one.

    Args:
        task: what is trained.
        optimizer: the optimizer.
        averages: the averages of the parameters by name.
        accumulate: microbatches per step, whose gradients are averaged; divides the batch size.

    Returns:
        A function to be jitted with the state donated. Metrics add up in `state.sums`.
    """

    def train_step(state: TrainState, batch: Batch, key: Key) -> TrainState:
        key = stream(key, "step", state.step)
        examples = task.draw(state.carried, batch, key)
        grads, terms = mean_gradient(task, state, examples, stream(key, "dropout"), accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        carried, sums = task.observe(state.carried, examples, terms)
        grad_norm = optax.tree.norm(grads)
        norms = {
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        sums = dict(sums) | {name: jnp.stack([norm, jnp.ones(())]) for name, norm in norms.items()}

        updated = TrainState(
            step=state.step,
            params=params,
            ema={name: lerp(state.ema[name], params, 1 - decay(state.step)) for name, decay in averages.items()},
            opt_state=opt_state,
            carried=carried,
            sums=jax.tree.map(jnp.add, state.sums, sums),
            skipped=jnp.zeros_like(state.skipped),
            skipped_total=state.skipped_total,
        )
        unchanged = replace(state, skipped=state.skipped + 1, skipped_total=state.skipped_total + 1)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(norms["param_norm"])
        finite &= jax.tree.reduce(lambda so_far, leaf: so_far & jnp.isfinite(leaf).all(), carried, True)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, unchanged)
        return replace(state, step=state.step + 1)

    return train_step


def make_diagnosis(task: Task, *, accumulate: int) -> Callable[[TrainState, Batch, Key], dict[str, PyTree]]:
    """Builds a function that computes a skipped step again and keeps what the step throws away.

    Args:
        task: what is trained.
        accumulate: microbatches per step.

    Returns:
        A function (state after the step, its batch, key) -> whether every "parameters" and "gradients" tensor is
        finite, and for every example whether its "losses" are, all in the order in which a step computes them.
    """

    def diagnose(state: TrainState, batch: Batch, key: Key) -> dict[str, PyTree]:
        key = stream(key, "step", state.step - 1)
        examples = task.draw(state.carried, batch, key)
        grads, terms = mean_gradient(task, state, examples, stream(key, "dropout"), accumulate)
        every = functools.partial(jax.tree.map, lambda tensor: jnp.isfinite(tensor).all())
        return {"parameters": every(state.params), "losses": jnp.isfinite(terms.total), "gradients": every(grads)}

    return diagnose


def mean_gradient(
    task: Task, state: TrainState, examples: PyTree, key: Key, accumulate: int
) -> tuple[Params, PyTree]:  # fmt: skip
    """Gradient of the mean loss, computed in `accumulate` microbatches to save memory.

    Microbatch j takes examples j, j + accumulate, ..., which keeps the batch axis split evenly over devices.

    Returns:
        The gradient, and what the loss reports of every example, in batch order.
    """
    gradient = jax.grad(task.loss, has_aux=True)
    if accumulate == 1:
        return gradient(state.params, state.carried, examples, key)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

    def merge(x):
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def add(total, item):
        index, microbatch = item
        grads, terms = gradient(state.params, state.carried, microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(lambda a, b: a + b / accumulate, total, grads), terms

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    microbatches = (jnp.arange(accumulate), jax.tree.map(split, examples))
    grads, terms = jax.lax.scan(add, zeros, microbatches, unroll=unroll_gradients())
    return grads, jax.tree.map(merge, terms)


def lerp(start: Params, end: Params, weight: jax.Array) -> Params:
    """Start + weight * (end - start), leaf by leaf."""
    return jax.tree.map(lambda a, b: a + weight * (b - a), start, end)
