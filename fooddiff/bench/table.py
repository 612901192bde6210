"""Numbers as a table on the terminal and as JSON. Both name the machine."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fooddiff.bench.measure import Quantity
from fooddiff.runs.workdir import versions, write_json


def show(title: str, numbers: Mapping[str, Quantity], caption: str) -> None:
    """Prints the numbers with their spread."""
    table = Table("what", "median", "least to greatest", "unit", title=title)
    for name, (median, low, high, unit) in numbers.items():
        table.add_row(name, f"{median:.4g}", "" if low == high else f"{low:.4g} to {high:.4g}", unit)
    table.caption = caption
    Console().print(table)


def write(path: Path, command: str, numbers: Mapping[str, Quantity]) -> None:
    """Writes the numbers, the command and the versions that they depend on."""
    values = {name: number._asdict() for name, number in numbers.items()}
    write_json(path, {"command": command, "processor": processor(), "versions": versions(), "numbers": values})


def processor() -> str:
    """The devices and, of a CPU, its model."""
    devices = versions()["devices"]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []  # not on every system
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{devices} ({len(models)} x {models[0]})" if models else devices
