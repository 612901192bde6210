"""Checkpoints: the only module that talks to Orbax.

A checkpoint of step k is the directory `checkpoints/<k>` with the items

- `params`: the raw weights;
- `ema`: every average, by rate;
- `rest`: step, optimizer, timestep history and metrics, which only training needs;
- `meta`: JSON with the config, the class names and the identity of the data.

Restoring always fills a typed abstract state that carries shardings, so that a checkpoint from any number of devices
loads on whatever devices there are, and indices of lists stay numbers.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from fooddiff.arrays import Params
from fooddiff.train.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving waits for saves that are under way."""

    def __init__(self, workdir: Path, *, max_to_keep: int | None = None, read_only: bool = False):
        """Opens `workdir/checkpoints`.

        Args:
            workdir: the run's directory.
            max_to_keep: how many of the newest checkpoints to keep; None keeps all.
            read_only: for readers, which neither create the directory nor clean it.
        """
        self.directory = Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("params", "ema", "rest", "meta")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        # Closing waits for the other processes. After an error of the devices they may be gone.
        if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Starts to save a state in the background; waits for the previous save first."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema=ocp.args.StandardSave(state.ema),
                rest=ocp.args.StandardSave(replace(state, params={}, ema={})),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )

    def wait(self) -> None:
        """Waits until every save has been committed, and raises the error of one that failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a whole training state.

        Args:
            step: one of `steps()`.
            like: shapes, dtypes and shardings of the state (see `with_sharding`).

        Returns:
            The state, on the devices that the shardings name.
        """
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                ema=ocp.args.StandardRestore(like.ema),
                rest=ocp.args.StandardRestore(replace(like, params={}, ema={})),
            ),
        )
        return replace(items.rest, params=items.params, ema=items.ema)

    def restore_weights(self, step: int, like: Params, ema_rate: str | None) -> Params:
        """Restores the weights alone.

        Args:
            step: one of `steps()`.
            like: shapes, dtypes and shardings of the parameters.
            ema_rate: which average, or None for the raw weights.

        Returns:
            The parameters.
        """
        if ema_rate is None:
            return self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(like))).params
        item = ocp.args.PyTreeRestore(
            {ema_rate: like}, restore_args=_restore_args({ema_rate: like}), partial_restore=True
        )
        return self._manager.restore(step, args=ocp.args.Composite(ema=item)).ema[ema_rate]

    def meta(self, step: int) -> dict[str, Any]:
        """The config, class names and data identity that were saved with a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def with_sharding(abstract, sharding: jax.sharding.Sharding):
    """Adds a sharding to the output of `jax.eval_shape`, which drops it."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)


def choose_step(checkpoints: Checkpoints, step: int | None) -> int:
    """Picks the newest checkpoint, or the one asked for.

    Raises:
        FileNotFoundError: there is no checkpoint, or not that one.
    """
    steps = checkpoints.steps()
    if not steps:
        raise FileNotFoundError(
            f"no checkpoint in {checkpoints.directory}: train first with run_train.py, or check --workdir"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {checkpoints.directory}: there are {steps}")
    return steps[-1] if step is None else step


def _restore_args(like):
    return ocp.checkpoint_utils.construct_restore_args(like)
