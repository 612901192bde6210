"""The training loop: checkpoint, periodic actions, step, status. Owns the order of events and nothing else."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from fooddiff.arrays import Batch, Key
from fooddiff.train.state import TrainState
from fooddiff.train.step import StepFn


class Periodic(NamedTuple):
    """Something to do every so often with the state, such as drawing a grid.

    A run that was interrupted and goes on at a step asks for that step's actions again, so `act` leaves alone what it
    finds done.
    """

    every_steps: int
    act: Callable[[int, TrainState], None]


class NonFiniteError(RuntimeError):
    """Training stopped because gradients stayed non-finite."""


def train(
    state: TrainState,
    step_fn: StepFn,
    batches: Iterator[Batch],
    key: Key,
    *,
    steps: int,
    log_every: int,
    checkpoint_every: int,
    max_skipped: int,
    record: Callable[[int, Mapping[str, float]], None],
    diagnose: Callable[[TrainState, Batch], str],
    periodic: Sequence[Periodic],
    save: Callable[[TrainState], None],
    should_stop: Callable[[], bool],
    show_progress: bool,
) -> TrainState:
    """Trains until `steps` steps are done in all, or until it is asked to stop.

    Args:
        state: where to start; donated.
        step_fn: the compiled step.
        batches: yields the batch of step `state.step`, then the following ones.
        key: the run's root key, on the device.
        steps: total number of steps of the run, over all restarts.
        log_every: steps between two records.
        checkpoint_every: steps between two checkpoints; the last step is always saved.
        max_skipped: consecutive steps with a non-finite gradient after which the run stops.
        record: receives (step, numbers) at log points.
        diagnose: says what is not finite in the step that led to a state.
        periodic: what else to do, each at multiples of its own period after the first step, and after the last one. The
            checkpoint of such a step comes first, so that nothing is lost with an action that fails.
        save: saves a checkpoint.
        should_stop: asked before every step; when true, the state is saved as it is and returned.
        show_progress: whether to draw a progress bar.

    Returns:
        The last state.

    Raises:
        NonFiniteError: `max_skipped` steps in a row had a non-finite gradient.
    """
    start = done = window_step = int(state.step)
    window_start, waited = time.perf_counter(), 0.0
    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=not show_progress) as progress:
        while True:
            pause = time.perf_counter()
            saved = done == start
            if not saved and (done % checkpoint_every == 0 or done == steps):
                save(state)
                saved = True
            for action in periodic:
                if done > 0 and (done % action.every_steps == 0 or done == steps):
                    action.act(done, state)
            stopping = should_stop()
            if stopping and not saved:
                save(state)
            if stopping or done >= steps:
                return state
            window_start += time.perf_counter() - pause  # throughput counts training alone

            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            with jax.transfer_guard("disallow"):
                state = step_fn(state, batch, key)
            done += 1
            progress.update()

            if done % log_every == 0 or done == steps:
                values, state = read_metrics(state)  # waits for the device; nothing else in this loop does
                images = len(batch.pixels) * (done - window_step)
                seconds = time.perf_counter() - window_start
                values |= {
                    "perf/images_per_second": images / seconds,
                    "perf/input_wait": waited / seconds,
                }  # of the time
                record(done, values)
                progress.set_postfix_str(_postfix(values))
                if (skipped := int(state.skipped)) >= max_skipped:
                    raise NonFiniteError(
                        f"step {done}: the last {skipped} gradients were not finite, so nothing was learned from them; "
                        f"{diagnose(state, batch)}. Lower config.optimizer.lr or set config.optimizer.clip_norm; the "
                        f"last checkpoint is sound."
                    )
                window_start, window_step, waited = time.perf_counter(), done, 0.0


def _postfix(values: Mapping[str, float]) -> str:
    loss = values.get("train/loss", float("nan"))  # absent when every gradient of the window was skipped
    return f"loss {loss:.4f}, {values['perf/images_per_second']:.1f} images/s"


def read_metrics(state: TrainState) -> tuple[dict[str, float], TrainState]:
    """Reads the means since the last log point from the device and starts a new window.

    Returns:
        ({"train/loss": mean, ...}, the state with empty sums). A mean over no examples is left out.
    """
    sums = jax.device_get(state.sums)
    values = {f"train/{name}": float(total / count) for name, (total, count) in sums.items() if count > 0}
    values["train/skipped"] = float(state.skipped_total)
    zeros = jax.tree.map(lambda old: jax.device_put(np.zeros_like(old), old.sharding), state.sums)
    return values, replace(state, sums=zeros)
