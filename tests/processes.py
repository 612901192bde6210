"""Python programs that tests start beside themselves: nothing waits for them without end, none outlives its test."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Process:
    """A running program, with everything it prints in a file."""

    def __init__(self, popen: subprocess.Popen, log: Path):
        self.popen = popen
        self._log = log

    def wait_until(self, condition: Callable[[], object], *, timeout: float = 240) -> None:
        """Waits for something that the program does; it must neither end nor take longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.popen.poll() is None, f"ended with status {self.popen.returncode}: {self._log.read_text()}"
            assert time.monotonic() < deadline, f"not within {timeout} s: {self._log.read_text()}"
            time.sleep(0.02)

    def end(self, *, timeout: float = 240) -> tuple[int, str]:
        """Waits for the exit status, and returns it with what was printed."""
        try:
            return self.popen.wait(timeout), self._log.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {timeout} s: {self._log.read_text()}") from None


@contextmanager
def started(arguments: Sequence, log: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[Process]:
    """Starts `python *arguments` in the repository's root, and kills it at the end if it still runs."""
    with log.open("w") as file:
        popen = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield Process(popen, log)
    finally:
        popen.kill()
        popen.wait()


@contextmanager
def started_together(arguments: Sequence, logs: Path) -> Iterator[list[Process]]:
    """Starts `python *arguments` twice, as processes that know each other, with two fake CPU devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {
        "XLA_FLAGS": " ".join([*flags, "--xla_force_host_platform_device_count=2"]),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    logs.mkdir(exist_ok=True)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(arguments, logs / f"{index}.log", environment=environment | {"JAX_PROCESS_ID": str(index)})
            )
            for index in range(2)
        ]
