"""The processes of one run, one or several on as many hosts. Owns what they must agree on.

Every process runs the same program and calls the functions of this module in the same order. All of them see the same
files: the workdir and the caches are on a disk that they share, and process 0 is the one that writes.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fooddiff import parallel
from fooddiff.arrays import PyTree

HEARTBEAT_SECONDS = 60  # how long a process may be silent before the others give it up
LAG = 2  # steps between a vote and its count, so that no process waits for its devices


def join() -> None:
    """Joins the other processes of the run. Call it before anything asks JAX for a device.

    SLURM, Open MPI and TPU pods tell every process its place; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process
    0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
        ValueError: neither says how many processes there are.
    """
    # JAX's own answer to SIGTERM would shadow ours, which knows SIGINT too.
    jax.config.update("jax_enable_preemption_service", False)
    number, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=number and int(number),
            process_id=index and int(index),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed is set, but nothing tells this process its place among the others ({error}). Start it with "
            f"srun or mpirun or on a TPU pod, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
            f"JAX_PROCESS_ID"
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which writes the files and talks to the terminal."""
    return jax.process_index() == 0


def on_first(action: Callable[[], object]) -> None:
    """Runs an action in process 0 while the others wait for its end.

    Raises:
        Exception: what the action raised, in process 0.
        RuntimeError: in the others, if it raised.
    """
    error = None
    if is_first():
        try:
            action()
        except Exception as raised:
            error = raised
    if first_says(error is not None):
        raise error or RuntimeError("process 0 met an error, which it shows")


def first_says(answer: int) -> int:
    """The answer of process 0, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(answer, np.int64)))


def on_host(value: jax.Array) -> np.ndarray:
    """An array's whole value, wherever its parts lie. Every process must ask, in the same order."""
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def sha256_of(tree: PyTree) -> str:
    """Hash of every array's place, dtype, shape and bytes, in hexadecimal. Every process must ask."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = on_host(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value))
    return digest.hexdigest()


def check_same(what: str, value: str) -> None:
    """Checks that every process has the same value.

    Raises:
        ValueError: this process has another value than process 0.
    """
    mine = np.frombuffer(value.encode().ljust(256)[:256], np.uint8)
    same = np.array_equal(multihost_utils.broadcast_one_to_all(mine), mine)
    if not multihost_utils.process_allgather(np.asarray(same)).all():
        raise ValueError(f"{what} differs between the processes: process {jax.process_index()} has {value}")


class Vote:
    """The largest number that any process has cast, told to all of them at the same call."""

    def __init__(self):
        """Nothing is cast yet; the outcome is 0."""
        self._pending: deque[jax.Array] = deque()
        self._outcome = 0
        if jax.process_count() > 1:
            devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
            mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
            self._one_each = NamedSharding(mesh, PartitionSpec("process"))
            self._largest = jax.jit(lambda votes: votes.max(), out_shardings=parallel.replicated(mesh))

    def __call__(self, number: int, *, wait: bool) -> int:
        """Casts a number, 0 or more.

        Args:
            number: this process's.
            wait: count this call's votes, too; else those of `LAG` calls ago, which costs no waiting.

        Returns:
            The largest number that was counted so far, the same in every process.
        """
        if jax.process_count() == 1:
            self._outcome = max(self._outcome, number)
            return self._outcome
        ballot = np.array([number], np.int32)
        self._pending.append(self._largest(jax.make_array_from_process_local_data(self._one_each, ballot)))
        while len(self._pending) > (0 if wait else LAG):
            self._outcome = max(self._outcome, int(self._pending.popleft()))
        return self._outcome


def explain(error: Exception) -> str:
    """The message of an error; says so when it may come from a process that is gone."""
    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return str(error)
    return (
        f"process {jax.process_index()} of {jax.process_count()} cannot reach the others: one was killed, or has ended "
        f"with a message of its own. What was saved is sound; start all processes again with the same command to go "
        f"on. JAX says: {str(error).splitlines()[0]}"
    )


def leave(status: int) -> NoReturn:
    """Ends this process at once, without waiting for the others, who may be gone or wait for this one."""
    os._exit(status)
