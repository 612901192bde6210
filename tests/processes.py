"""Starts several processes of one run on this machine, two fake CPU devices each."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Process:
    """One of the processes, with everything it prints in a file."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], log: Path):
        self._log = log
        with log.open("w") as file:
            self.popen = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def end(self, *, timeout: float = 120) -> tuple[int, str]:
        """Waits for the exit status, and returns it with what was printed."""
        return self.popen.wait(timeout), self._log.read_text()


@contextmanager
def started(arguments: Sequence[str], logs: Path, *, count: int = 2) -> Iterator[list[Process]]:
    """Starts `python *arguments` as processes that know each other; kills what is left of them at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {
        "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=2"]),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    logs.mkdir(exist_ok=True)
    running = [
        Process(arguments, environment | {"JAX_PROCESS_ID": str(index)}, logs / f"{index}.log")
        for index in range(count)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.popen.kill()
            process.popen.wait()
