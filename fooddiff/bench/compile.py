"""What it takes until the first step: imports and compilation, and both again with the compiler's cache filled."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fooddiff.bench.measure import Quantity, quantity, timed


def run(arguments: Sequence[str], *, repetitions: int) -> dict[str, Quantity]:
    """Times run_train.py in processes of its own, from the command to the record of the first step.

    Args:
        arguments: flags of run_train.py: --config, and overrides that say where the data are.
        repetitions: how often each is timed.

    Returns:
        Seconds of the imports, and of a first step with an empty and then with a filled cache of compiled programs.

    Raises:
        RuntimeError: a command failed; shows what it said.
    """
    seconds: dict[str, list[float]] = {"imports": [], "first step, compiling": [], "first step, compiled before": []}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla"}
            for name in ("first step, compiling", "first step, compiled before"):
                seconds[name].append(_first_step(arguments, Path(folder) / name, environment))
            imports = [sys.executable, "-c", "import fooddiff.commands.train"]
            seconds["imports"].append(timed(lambda imports=imports: subprocess.run(imports, check=True)))
    return {name: quantity(values, "s") for name, values in seconds.items()}


def _first_step(arguments: Sequence[str], workdir: Path, environment: dict[str, str]) -> float:
    program = "from fooddiff.commands.scripts import train; train()"
    command = [sys.executable, "-c", program, *arguments, f"--workdir={workdir}", "--config.log.every_steps=1"]
    metrics, start = workdir / "metrics.jsonl", time.perf_counter()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as training:
        while not (metrics.exists() and metrics.stat().st_size):
            if training.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended: {training.stderr.read()[-2000:]}")
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        training.kill()
    return seconds
