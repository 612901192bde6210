"""Imports go one way, every heavy or optional library has one room, and doors hold no logic."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fooddiff"

# Each room may import those before it, and within diffusion/ each module those before it.
ORDER = [
    "files", "settings", "arrays", "keys", "xla", "parallel", "processes", "chunks", "codec", "low_res",
    "diffusion.schedule", "diffusion.timesteps", "diffusion.weights", "diffusion.level", "diffusion.discrete",
    "diffusion.continuous", "diffusion.denoiser", "diffusion.guidance", "diffusion.losses", "diffusion.samplers",
    "diffusion.likelihood", "diffusion",
    "model", "data", "train", "sample", "eval", "build", "runs", "report", "convert", "bench", "api", "demo",
    "commands", "__init__",
]  # fmt: skip
ONLY = {"files": {"files"}, "settings": set(), "diffusion": {"arrays", "diffusion"}}  # what these may import of ours
LIBRARIES = {  # files or folders that may import them
    "flax": ("model/",),
    "orbax": ("runs/checkpoint.py",),
    "tensorflow_datasets": ("data/sources/food101_tfds.py",),
    "matplotlib": ("report/figures.py", "report/svg.py"),
    "jinja2": ("report/page.py",),
    "sklearn": ("data/sources/sklearn_digits.py",),
    "tensorboardX": ("runs/record.py",),
    "wandb": ("runs/record.py",),
    "safetensors": ("files/safetensors_file.py", "eval/weights.py", "runs/weights_file.py", "convert/"),
    "ml_collections": ("build.py", "runs/", "convert/", "bench/", "commands/"),
    "absl": ("commands/flags.py", "commands/terminal.py"),
    "argparse": ("commands/",),
    "starlette": ("demo/server.py",),
    "uvicorn": ("demo/server.py",),
    "torch": ("bench/peer/", "convert/huggingface/"),  # which run in the environments of others
    "diffusers": ("convert/huggingface/",),
    "tensorflow": (),
    "torchvision": (),
}


def imports(path: Path) -> set[str]:
    """Every module name that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def place(name: str) -> int:
    """Where a module, named without the package, stands in the order."""
    room, *inner = name.split(".")
    assert room in ORDER, f"fooddiff/{room} is missing in ORDER"
    known = ".".join([room, *inner[:1]])
    return ORDER.index(known if known in ORDER else room)


def test_imports_go_down():
    for path in PACKAGE.rglob("*.py"):
        room, *inner = path.relative_to(PACKAGE).with_suffix("").parts
        if inner == ["__main__"]:
            continue  # a door, see below
        name = ".".join([room, *(part for part in inner if part != "__init__")])
        ours = {each.removeprefix("fooddiff.") for each in imports(path) if each.startswith("fooddiff.")} - {room}
        upward = [other for other in ours if place(other) > place(name)]
        assert not upward, f"{name} must not import {', '.join(upward)}"
        outside = {other.split(".")[0] for other in ours} - ONLY.get(room, set(ORDER))
        assert not outside, f"{room} must not know {', '.join(outside)}"


def test_libraries_stay_in_their_rooms():
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).as_posix()
        for library in {name.split(".")[0] for name in imports(path)} & LIBRARIES.keys():
            assert here.startswith(LIBRARIES[library]), f"{here}: {library} belongs in {LIBRARIES[library]}"


def test_doors_hold_no_logic():
    doors = [ROOT / "run_train.py", ROOT / "run_sample.py", *PACKAGE.rglob("__main__.py")]
    for path in doors:
        assert all(name.startswith("fooddiff.commands.") for name in imports(path)), path
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(statements) == 3, f"{path}: expected a docstring, an import and a call"
