"""Imports go one way, and every heavy or optional library has one room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fooddiff"

# Each part may import those before it.
ORDER = [
    "arrays",
    "keys",
    "xla",
    "processes",
    "codec",
    "diffusion",
    "model",
    "data",
    "train",
    "sample",
    "eval",
    "report",
    "runs",
    "build",
    "commands",
    "convert",
    "api",
    "bench",
]
DIFFUSION_ORDER = [
    "schedule", "timesteps", "weights", "level", "discrete", "continuous",
    "denoiser", "guidance", "losses", "samplers", "likelihood",
]  # fmt: skip
ROOMS = {
    "flax": {
        "model/unet.py",
        "model/uvit.py",
        "model/classifier.py",
        "model/autoencoder.py",
        "model/taesd.py",
        "model/discriminator.py",
        "model/network.py",
    },
    "orbax": {"train/checkpoint.py"},
    "tensorflow_datasets": {"data/sources/food101_tfds.py"},
    "matplotlib": {"report/figures.py", "report/svg.py"},
    "jinja2": {"report/page.py"},
    "sklearn": {"data/sources/sklearn_digits.py"},
    "tensorboardX": {"train/record.py"},
    "wandb": {"train/record.py"},
    "safetensors": {"eval/weights.py", "runs/weights_file.py"},
    "ml_collections": {
        "build.py",
        "bench/__main__.py",
        "bench/data.py",
        "bench/sample.py",
        "bench/topology.py",
        "bench/train.py",
        "commands/train.py",
        "commands/fine_tune.py",
        "commands/dry_run.py",
        "commands/workdir.py",
        "convert/__main__.py",
        "convert/importing.py",
    },
}
PEERS_SIDE = {"bench/reference_worker.py"}  # runs in the peer's environment
FORBIDDEN = {"torch", "tensorflow", "torchvision"}
MODULES = sorted(PACKAGE.rglob("*.py"))


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


def part(name: str) -> str:
    """The part of the package that a dotted module name belongs to; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts
    if here in {("__init__",), ("eval", "__main__"), ("report", "__main__")}:
        return  # an empty root, and commands that compose like `commands`
    for name in imports(path):
        if name.startswith("fooddiff.") and part(name) in ORDER:
            assert ORDER.index(part(name)) <= ORDER.index(here[0]), f"{here} must not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(path):
    here = str(path.relative_to(PACKAGE))
    roots = {name.split(".")[0] for name in imports(path)}
    assert here in PEERS_SIDE or not roots & FORBIDDEN
    for library, rooms in ROOMS.items():
        assert library not in roots or here in rooms, f"{library} belongs in {rooms}"


def test_diffusion_is_pure_maths():
    for path in (PACKAGE / "diffusion").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("fooddiff.")}
        assert {part(name) for name in ours} <= {"arrays", "diffusion"}, path
        inner = {name.split(".")[2] for name in ours if part(name) == "diffusion" and name.count(".") >= 2}
        if path.stem != "__init__":
            assert all(DIFFUSION_ORDER.index(name) < DIFFUSION_ORDER.index(path.stem) for name in inner), path


def test_every_part_is_listed():
    parts = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    assert parts <= set(ORDER)


def test_entry_points_hold_no_logic():
    for name in ("run_train.py", "run_sample.py"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 65
