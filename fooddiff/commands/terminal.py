"""What a command's user sees besides progress bars: log lines, and errors of their own making without a traceback."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from absl import logging as absl_logging
from rich.console import Console
from tqdm.contrib.logging import logging_redirect_tqdm

EXPECTED = (ValueError, OSError, ModuleNotFoundError, RuntimeError)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends an expected error with a message and status 1: for commands that need no device and no log."""
    try:
        yield
    except EXPECTED as error:
        if os.environ.get("FOODDIFF_TRACEBACK"):
            raise
        _fail(str(error))


@contextmanager
def session(*, distributed: bool) -> Iterator[None]:
    """Shows this project's log lines above progress bars, and ends an expected error with a message and status 1.

    Ctrl-C, where a command does not catch it to finish what is under way, ends the process at once with status 130.
    Libraries that log through absl are heard from errors on. Set FOODDIFF_TRACEBACK=1 to see tracebacks.

    Args:
        distributed: whether this is one of several processes of a run, which it then joins. Process 0 shows the log,
            the others only warnings. A process that fails ends without waiting for the others, which end as soon as
            they miss it.
    """
    from fooddiff import processes  # imports JAX, which a misspelt flag need not wait for
    from fooddiff.xla import keep_compiled

    absl_logging.set_verbosity(absl_logging.ERROR)
    logger = logging.getLogger("fooddiff")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [logging.StreamHandler()]
    try:
        keep_compiled()
        if distributed:
            processes.join()
            if not processes.is_first():
                logger.setLevel(logging.WARNING)
        with logging_redirect_tqdm(loggers=[logger]):
            yield
    except KeyboardInterrupt:
        if os.environ.get("FOODDIFF_TRACEBACK"):
            raise
        _print_error("interrupted")
        processes.leave(128 + signal.SIGINT)  # a library's threads, those of a download for instance, would go on
    except EXPECTED as error:
        if os.environ.get("FOODDIFF_TRACEBACK"):
            raise
        message = processes.explain(error)
        if distributed:
            _print_error(message)
            processes.leave(1)
        _fail(message)


def _fail(message: str) -> NoReturn:
    _print_error(message)
    sys.exit(1)


def _print_error(message: str) -> None:
    # what a message quotes may come from anybody: no control character of it reaches the terminal
    message = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    Console(stderr=True).print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
