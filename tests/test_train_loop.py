import dataclasses
import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.arrays import Batch
from fooddiff.train.loop import NonFiniteError, Periodic, read_metrics, train
from fooddiff.train.state import TrainState, zero_sums


def state(step=0):
    return jax.device_put(
        TrainState(
            step=jnp.int32(step), params={}, ema={}, opt_state=(), carried=None, sums=zero_sums(("loss", "grad_norm")),
            skipped=jnp.int32(0), skipped_total=jnp.int32(0),
        )
    )  # fmt: skip


@jax.jit
def count(state, batch, key):
    """A step whose loss is the number of the step."""
    sums = state.sums | {"loss": state.sums["loss"] + jnp.stack([state.step + 1.0, jnp.float32(1)])}
    return dataclasses.replace(state, step=state.step + 1, sums=sums)


@jax.jit
def skip(state, batch, key):
    return dataclasses.replace(
        state, step=state.step + 1, skipped=state.skipped + 1, skipped_total=state.skipped_total + 1
    )


class Events:
    """What a run does, in order. As `act` must, `draw` leaves alone what an interrupted run has `drawn`."""

    def __init__(self, start, step_fn=count, drawn=(), batches=None, **settings):
        self.log, self.drawn, self.waits = [], set(drawn), []
        same = itertools.repeat(Batch(np.zeros((2, 1, 1, 3), np.uint8), {"y": np.zeros(2, np.int32)}))
        settings = dict(steps=7, log_every=2, checkpoint_every=3, max_skipped=4, should_stop=lambda: False) | settings

        def note(step, values):
            self.log.append(("record", step, values.get("train/loss")))
            self.waits.append(values["perf/input_wait"])

        def draw(step, state):
            if step not in self.drawn:
                self.drawn.add(step)
                self.log.append(("grid", step, int(state.step)))

        self.state = train(
            start,
            step_fn,
            batches or (jax.device_put(batch) for batch in same),
            jax.device_put(jax.random.key(0)),
            record=note,
            periodic=[Periodic(4, draw)],
            save=lambda state: self.log.append(("save", int(state.step), float(state.sums["loss"][0]))),
            show_progress=False,
            diagnose=lambda state, batch: f"which was found at step {int(state.step)}",
            **settings,
        )


def test_order_of_events():
    events = Events(state())
    assert events.log == [
        ("record", 2, 1.5),
        ("save", 3, 3.0),  # the sums of the open window are saved, too
        ("record", 4, 3.5),
        ("grid", 4, 4),
        ("record", 6, 5.5),
        ("save", 6, 0.0),
        ("record", 7, 7.0),
        ("save", 7, 0.0),  # before whatever else the step asks for
        ("grid", 7, 7),
    ]


def test_a_resumed_run_repeats_no_event():
    whole, part = Events(state()), Events(state(), steps=4)
    assert Events(part.state, drawn=part.drawn).log == [event for event in whole.log if event[1] > 4]


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_that_was_asked_to_stop_saves_and_repeats_no_event(stop):
    calls = itertools.count()
    whole, part = Events(state()), Events(state(), should_stop=lambda: next(calls) == stop)
    assert int(part.state.step) == stop
    assert part.log[-1][:2] == ("save", stop)
    scheduled = [event for event in part.log if event[0] != "save" or event[1] % 3 == 0]
    assert scheduled + Events(part.state, drawn=part.drawn).log == whole.log


def test_an_action_that_was_interrupted_is_made_up_for_on_resuming():
    assert Events(state(4)).log[0] == ("grid", 4, 4)
    assert Events(state(7)).log == [("grid", 7, 7)]


def test_a_finished_run_does_nothing():
    assert Events(state(7), drawn={7}).log == []


def test_stops_when_gradients_stay_non_finite():
    with pytest.raises(NonFiniteError, match=r"step 4: the last 4 gradients were not finite.*found at step 4"):
        Events(state(), skip)


def test_waiting_for_input_is_measured():
    def slow():
        while True:
            time.sleep(0.02)
            yield jax.device_put(Batch(np.zeros((2, 1, 1, 3), np.uint8), {"y": np.zeros(2, np.int32)}))

    assert Events(state(), batches=slow()).waits[-1] > 0.5
    assert all(0 <= wait <= 1 for wait in Events(state()).waits)


def test_read_metrics_starts_a_new_window_and_leaves_out_empty_means():
    values, fresh = read_metrics(count(state(), None, jax.random.key(0)))
    assert values["train/loss"] == 1.0
    assert "train/mse" not in values
    assert not any(math.isnan(value) for value in values.values())
    assert float(fresh.sums["loss"].sum()) == 0
