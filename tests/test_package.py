"""The package as pip sees it."""

import importlib
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_console_scripts_exist_and_explain_themselves(script, capsys):
    module, function = PROJECT["scripts"][script].split(":")
    with pytest.raises(SystemExit) as stopped:
        getattr(importlib.import_module(module), function)(["--help"])
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.slow
def test_importing_the_package_imports_no_jax():
    code = "import sys, fooddiff; assert 'jax' not in sys.modules; fooddiff.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_reports_page(tmp_path):
    """Built in an environment of its own; the working tree is left as it was."""
    venv.create(tmp_path / "venv", with_pip=True)
    tree = tmp_path / "tree"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    pip = [str(tmp_path / "venv" / "bin" / "python"), "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path)]
    subprocess.run([*pip, str(tree)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("fooddiff-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {str(path.relative_to(tree)) for path in (tree / "fooddiff").rglob("*") if path.is_file()}
    assert not {name for name in wanted if name.endswith((".py", ".html", ".css", ".js"))} - held
