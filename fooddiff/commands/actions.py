"""What a training does beside its steps: every task brings its own."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fooddiff.arrays import Params
from fooddiff.commands import signals
from fooddiff.data.cache import Dataset
from fooddiff.data.latents import Latents
from fooddiff.runs.record import NoRecorder, Recorder
from fooddiff.train.loop import Periodic


class Surroundings(NamedTuple):
    """Where an action finds what it needs besides the state, and where its results go."""

    dataset: Dataset  # the training split
    examples: Dataset | Latents  # what batches are taken from, in the same order
    codec: Params  # what a model needs besides what is trained, by name
    workdir: Path
    recorder: Recorder | NoRecorder
    stop_signal: signals.StopSignal
    add_score: Callable[[int, float], None]  # (step, score): see `Checkpoints.add_score`


class Actions(NamedTuple):
    """The actions of a task. Making them checks their config, so that a mistake is named before the data are read."""

    check_data: Callable[[Dataset], None]  # raises, before the first step, what the data would make the actions raise
    periodic: Callable[[Surroundings], list[Periodic]]
    next_command: str  # what to do with a run that is done; {} is its workdir
