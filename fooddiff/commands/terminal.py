"""How errors of the user's making reach the terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

EXPECTED = (ValueError, OSError, ModuleNotFoundError)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Prints an expected error without a traceback and exits with status 1.

    Set FOODDIFF_TRACEBACK=1 to see the traceback.
    """
    try:
        yield
    except EXPECTED as error:
        if os.environ.get("FOODDIFF_TRACEBACK"):
            raise
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
