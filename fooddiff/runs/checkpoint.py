"""Checkpoints: the only module that talks to Orbax.

A checkpoint of step k is the directory `checkpoints/<k>` with the items

- `params`: the raw weights;
- `ema`: every average, by name;
- `rest`: step, optimizer, what the task carries and metrics, which only training needs;
- `meta`: JSON with the config, the class names, the identity of the data, and the SHA-256 of every other item;
- `metrics`: JSON with the score by which the best checkpoints are kept, once there is one.

Orbax commits a checkpoint whole or not at all, but does not notice bits that flip on the disk later. The hashes do.

Restoring always fills a typed abstract state that carries shardings, so that a checkpoint from any number of devices
loads on whatever devices there are, and indices of lists stay numbers.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from fooddiff import processes
from fooddiff.arrays import Params, PyTree
from fooddiff.files.atomic import write_atomically
from fooddiff.files.hashes import sha256_of_json
from fooddiff.train.state import TrainState

log = logging.getLogger(__name__)


FORMAT = 1  # of a checkpoint's items; a program reads its own


class _Kept(np.ndarray):
    """An array that nobody changes, so that Orbax need not copy it."""

    def __deepcopy__(self, _memo: dict) -> "_Kept":
        return self


class _MetaHandler(ocp.JsonCheckpointHandler):
    """Writes what a function gives, which the thread that commits calls."""

    async def _save_fn(self, make: Callable[[], Mapping[str, Any]], directory: Any) -> None:
        await super()._save_fn(make(), directory)


@ocp.args.register_with_handler(_MetaHandler, for_save=True)
class _SaveMeta(ocp.args.JsonSave):
    pass


@ocp.args.register_with_handler(_MetaHandler, for_restore=True)
class _RestoreMeta(ocp.args.JsonRestore):
    pass


class DamagedError(ValueError):
    """A checkpoint that cannot be read or is not what was saved."""


class MisfitError(ValueError):
    """A sound checkpoint of another model."""


class SaveError(OSError):
    """A checkpoint that could not be written."""


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving waits for saves that are under way."""

    def __init__(self, workdir: Path, *, keep_newest: int | None = None, keep_best: int = 0, read_only: bool = False):
        """Opens `workdir/checkpoints`.

        A score that cannot be read is named and moved to `workdir/damaged`; its checkpoint counts as not scored.

        Args:
            workdir: the run's directory.
            keep_newest: how many of the newest checkpoints to keep; None keeps all.
            keep_best: how many of those with the lowest scores to keep besides.
            read_only: for readers, which neither create the directory nor clean it.
        """
        self.directory = Path(workdir).resolve() / "checkpoints"
        if not read_only:
            processes.on_first(self._set_aside_unreadable_scores)
        newest = preservation_policy.LatestN(keep_newest)
        best = preservation_policy.BestN(
            get_metric_fn=_score, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([newest, best]),
            best_fn=_score,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # a reader must not look into checkpoints that it only lists: the training may delete them meanwhile
            lightweight_initialize=read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("params", "ema", "rest", "meta")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        # Closing waits for the other processes. After an error of the devices they may be gone.
        if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
            try:
                self.wait()
            finally:
                self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Brings a state to the host, and hashes and writes it in the background; waits for the previous save first.

        Args:
            state: the state after step `state.step`.
            meta: what the checkpoint belongs to, as JSON types.

        Raises:
            SaveError: this save could not be started, or an earlier one failed.
        """
        try:
            self._manager.wait_until_finished()
            # on the CPU these are the buffers themselves, which JAX then keeps from the next step
            host = jax.tree.map(lambda leaf: processes.on_host(leaf).view(_Kept), state)
            rest = replace(host, params={}, ema={})

            def stored_meta() -> Mapping[str, Any]:
                parts = {"params": host.params, "rest": rest} | {f"ema/{rate}": ema for rate, ema in host.ema.items()}
                hashes = {name: processes.sha256_of(part) for name, part in parts.items()}
                hashes["meta"] = sha256_of_json(meta)
                return {"format": FORMAT, "meta": meta, "sha256": hashes}

            started = self._manager.save(
                int(host.step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(host.params),
                    ema=ocp.args.StandardSave(host.ema),
                    rest=ocp.args.StandardSave(rest),
                    meta=_SaveMeta(stored_meta),
                ),
            )
        except jax.errors.JaxRuntimeError:  # of the devices, not of the disk: another process may be gone
            raise
        except Exception as error:  # Orbax raises whatever its storage layers do
            raise self._save_error(error) from error
        if not started:
            raise SaveError(f"the checkpoint of step {int(host.step)} was not saved: {self.directory} has newer ones")

    def add_score(self, step: int, score: float) -> None:
        """Notes how good the weights of a checkpoint are; waits until it is committed.

        The next save acts on it, so until then one checkpoint more may be kept.

        Args:
            step: a step, whose checkpoint may be missing.
            score: of its weights, the lower the better. One that is not finite is left out.

        Raises:
            SaveError: it could not be written.
        """
        self.wait()
        if step not in self.steps() or not np.isfinite(score):
            return
        path = self.directory / str(step) / "metrics" / "metrics"
        try:
            processes.on_first(lambda: write_atomically(path, json.dumps({"score": score}).encode()))
        except OSError as error:
            raise self._save_error(error) from error
        self._manager.reload()

    def check(self) -> None:
        """Raises the error of a save that failed in the background; does not wait for one that is under way.

        Raises:
            SaveError: one failed.
        """
        # Orbax's check_for_errors sees nothing here: the thread that commits has taken the error, and joining it raises
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until every save has been committed.

        Raises:
            SaveError: one failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error

    def _save_error(self, error: Exception) -> SaveError:
        return SaveError(
            f"a checkpoint could not be written to {self.directory}: {_first_line(error)}. Those before it are "
            f"untouched; when there is room (df -h) and the directory can be written, the same command goes on"
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a whole training state and checks every bit.

        Args:
            step: one of `steps()`.
            like: shapes, dtypes and shardings of the state (see `with_sharding`).

        Returns:
            The state, on the devices that the shardings name. Metrics that were not measured yet when it was saved
            start empty, and those that are not measured any more are left out.

        Raises:
            DamagedError: a file is missing, cannot be read or has changed, or a number is not finite.
            MisfitError: the parameters, averages or the optimizer's state have other names, shapes or dtypes.
        """
        _, hashes = self._meta_and_hashes(step)
        any_sum = next(iter(like.sums.values()))
        rest = replace(like, params={}, ema={}, sums=dict.fromkeys(self._saved_tree(step, "rest")["sums"], any_sum))
        for name, item in {"params": like.params, "ema": like.ema, "rest": rest}.items():
            self._check_fit(step, name, item)
        items = self._read(
            step,
            params=ocp.args.StandardRestore(like.params),
            ema=ocp.args.StandardRestore(like.ema),
            rest=ocp.args.StandardRestore(rest),
        )
        self._compare(step, hashes, {"params": items.params, "rest": items.rest})
        self._compare(step, hashes, {f"ema/{rate}": ema for rate, ema in items.ema.items()})
        empty = jax.device_put(np.zeros(any_sum.shape, any_sum.dtype), any_sum.sharding)
        sums = {name: items.rest.sums.get(name, jnp.copy(empty)) for name in like.sums}
        return replace(items.rest, params=items.params, ema=items.ema, sums=sums)

    def restore_newest(self, like: TrainState, *, accept: Callable[[Mapping[str, Any]], None]) -> TrainState:
        """Restores the newest checkpoint that is sound; names those that are not and moves them out of the way.

        Args:
            like: see `restore`.
            accept: raises if a checkpoint with this `meta` belongs to another run.

        Returns:
            The state. Damaged checkpoints that were newer lie in `<workdir>/damaged/<step>`.

        Raises:
            DamagedError: none is sound; lists what is wrong with each. Nothing is moved then.
            MisfitError: see `restore`. One before it would be no better.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                accept(self.meta(step))
                state = self.restore(step, like)
            except DamagedError as error:
                log.error("%s", error)
                damaged[step] = str(error)
                continue
            if damaged:
                log.warning("going on from step %d, the newest checkpoint that is sound", step)
                processes.on_first(lambda: [self._set_aside(str(broken)) for broken in damaged])
                self._manager.reload()
            return state
        raise DamagedError("no checkpoint can be used:\n" + "\n".join(f"  {message}" for message in damaged.values()))

    def _set_aside(self, name: str) -> None:
        """Moves a checkpoint, or an item of one, to the same name in `<workdir>/damaged`."""
        place = self.directory.parent / "damaged" / name
        while place.exists():
            place = place.with_name(place.name + "_again")
        place.parent.mkdir(parents=True, exist_ok=True)
        (self.directory / name).rename(place)

    def _set_aside_unreadable_scores(self) -> None:
        for path in self.directory.glob("*/metrics/metrics"):
            try:
                _score(json.loads(path.read_bytes()))
            except (ValueError, TypeError, KeyError) as error:
                log.error("%s is damaged, its checkpoint counts as not scored: %s", path, _first_line(error))
                self._set_aside(str(path.parent.relative_to(self.directory)))

    def _saved_tree(self, step: int, item: str) -> PyTree:
        """Shapes and dtypes of what is saved, in nested dicts and lists."""
        with self._reading(step):
            return ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / item).tree

    def _check_fit(self, step: int, item: str, like: PyTree) -> None:
        saved, wanted = _layout(self._saved_tree(step, item)), _layout(like)
        if different := sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)):
            name = different[0]
            raise MisfitError(
                f"the checkpoint of step {step} in {self.directory} does not fit the model: {name} is "
                f"{saved.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}; in all {len(different)} "
                f"arrays of its item {item} differ. Use the version of the program that saved it (see versions.json)"
            )

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of the devices, whose memory may be full, not of the file
            raise
        except Exception as error:  # Orbax raises whatever its storage layers do
            raise DamagedError(
                f"the checkpoint of step {step} in {self.directory} is damaged or incomplete: {_first_line(error)}"
            ) from error

    def _compare(self, step: int, hashes: Mapping[str, str], items: Mapping[str, PyTree]) -> None:
        for name, item in items.items():
            if processes.sha256_of(item) != hashes.get(name):
                raise DamagedError(
                    f"the checkpoint of step {step} in {self.directory} is damaged: {name} is not what was saved"
                )
        if bad := [name for name, item in items.items() if not _is_finite(item)]:
            raise DamagedError(f"the checkpoint of step {step} in {self.directory} is not finite: {', '.join(bad)}")

    def restore_weights(self, step: int, like: Params, average: str | None) -> Params:
        """Restores the weights alone.

        Args:
            step: one of `steps()`.
            like: shapes, dtypes and shardings of the parameters.
            average: which one, or None for the raw weights.

        Returns:
            The parameters.

        Raises:
            DamagedError: a file is missing, cannot be read or has changed.
            MisfitError: the parameters have other names, shapes or dtypes.
        """
        _, hashes = self._meta_and_hashes(step)
        self._check_fit(step, "params", like)
        if average is None:
            params = self._read(step, params=ocp.args.StandardRestore(like)).params
            self._compare(step, hashes, {"params": params})
            return params
        wanted = {average: like}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        item = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        params = self._read(step, ema=item).ema[average]
        self._compare(step, hashes, {f"ema/{average}": params})
        return params

    def meta(self, step: int) -> dict[str, Any]:
        """The config, class names and data identity that were saved with a checkpoint.

        Raises:
            DamagedError: they cannot be read or have changed.
        """
        meta, _ = self._meta_and_hashes(step)
        return meta

    def _meta_and_hashes(self, step: int) -> tuple[dict[str, Any], dict[str, str]]:
        stored = self._read(step, meta=_RestoreMeta()).meta
        if isinstance(stored, dict) and (version := stored.get("format", 1)) != FORMAT:
            raise MisfitError(
                f"the checkpoint of step {step} in {self.directory} has format {version}, this version of the program "
                f"reads format {FORMAT}: use the version that saved it (see versions.json)"
            )
        try:
            meta, hashes = stored["meta"], stored["sha256"]
            if hashes["meta"] == sha256_of_json(meta):
                return meta, hashes
        except (KeyError, TypeError):
            pass
        raise DamagedError(f"the checkpoint of step {step} in {self.directory} is damaged: meta is not what was saved")


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


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _layout(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of every array, for instance {"opt_state/0/mu/conv_in.bias": "float32[64]"}."""
    flat = ocp.tree.to_flat_dict(tree, sep="/")
    return {name: f"{jnp.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in flat.items() if leaf is not None}


def _is_finite(tree: PyTree) -> bool:
    return all(np.isfinite(processes.on_host(leaf)).all() for leaf in jax.tree.leaves(tree))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
