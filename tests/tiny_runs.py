"""Finished runs that many tests begin with: each is trained once per session, by the process that asks first."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fooddiff.commands import train
from fooddiff.files.lock import locked
from tests import tiny


@pytest.fixture(scope="session")
def shared_workspace() -> Path:
    """A folder of all processes of the session, whose caches of data and features their configs can name."""
    return Path(os.environ["FOODDIFF_TEST_CACHE"]) / "workspace"


@pytest.fixture(scope="session")
def once(shared_workspace) -> Callable[[str, Callable], Path]:
    """(name, config) -> the finished run of that config, which nobody changes: copy it first."""

    def finished(name: str, config) -> Path:
        run, marker = shared_workspace / name, shared_workspace / f"{name}.finished"
        with locked(shared_workspace / "locks", name=f"{name}.lock", wait=True):
            if not marker.exists():
                train.run(config, run)
                marker.touch()
        return run

    return finished


@pytest.fixture(scope="session")
def tiny_run(shared_workspace, once) -> Path:
    """The run of `tiny.config(shared_workspace)`: checkpoints of steps 2 and 4, and grids of the last."""
    return once("tiny", tiny.config(shared_workspace))
