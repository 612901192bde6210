"""The workdir of a run: whose config it holds, who may write there, and what a restart may change."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from fooddiff.files.atomic import write_atomically
from fooddiff.files.lock import locked
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.settings import flatten

MAY_CHANGE = (
    # what a restart may change, since it leaves every step's result as it was, but for rounding (and for the masks of
    # dropout, which depend on train.accumulate)
    "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_best", "train.max_skipped",
    "train.shard", "train.accumulate", "model.remat", "optimizer.cooldown_steps",
    "data.path", "data.cache_dir", "codec.path", "perceptual.path", "sample", "eval", "log",
)  # fmt: skip
LOCK = ".lock"
VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")


class WorkdirError(ValueError):
    """A workdir that cannot be used as asked."""


def check(workdir: Path, config: ConfigDict) -> None:
    """Checks that a directory is free or holds a run of this config; writes nothing.

    Raises:
        WorkdirError: the directory holds a run with another config, or other files; shows the difference.
    """
    path = workdir / "config.json"
    if path.exists():
        saved = read_config(path)
        if changed := differences(saved, to_json(config)):
            shown = "\n".join(f"  {name}: {old!r} in the workdir, {new!r} now" for name, (old, new) in changed.items())
            raise WorkdirError(
                f"{workdir} belongs to a run with another config:\n{shown}\n"
                f"Give the same values to resume it, or another --workdir to start a new run."
            )
    elif workdir.exists() and any(file.name != LOCK for file in workdir.iterdir()):
        raise WorkdirError(f"{workdir} is not empty and holds no run: give another --workdir")


@contextmanager
def claimed(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Keeps every other training out of a workdir, which is made if it is missing, while the block runs.

    Raises:
        WorkdirError: another training uses the directory, or `check` refuses it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(workdir, name=LOCK, wait=False))
        except BlockingIOError as error:
            raise WorkdirError(
                f"another training is using {workdir} ({error.strerror}): wait for its end, or give another --workdir"
            ) from error
        check(workdir, config)
        yield


def write_identity(workdir: Path, config: ConfigDict) -> None:
    """Writes what makes a directory the workdir of a config, and which versions train it."""
    write_json(workdir / "config.json", to_json(config))
    write_json(workdir / "versions.json", versions())


def outputs(model: Path) -> Path:
    """Where what a model draws and scores goes: its workdir or, beside a file of weights, a directory of its name."""
    return model.with_suffix("") if model.is_file() else model


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config.json.

    Raises:
        WorkdirError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WorkdirError(f"{path} is damaged: {error}. It is written when the run begins or goes on") from error
    if not isinstance(content, dict):
        raise WorkdirError(f"{path} is damaged: it holds no JSON object. It is written when the run begins or goes on")
    return content


def checkpoint_steps(workdir: Path) -> list[int]:
    """The steps of a directory's complete checkpoints, ascending; none if it holds no run. Writes nothing."""
    if not (workdir / "checkpoints").is_dir():
        return []
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.steps()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields of two configs that differ and that a restart may not change: {dotted name: (old, new)}."""
    old, new = flatten(old), flatten(new)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not any((name + ".").startswith(free + ".") for free in MAY_CHANGE)
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return packages | {"python": platform.python_version(), "devices": devices}


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types, references resolved."""
    return json.loads(json.dumps(config.to_dict()))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
