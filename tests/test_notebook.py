"""The notebook holds one picture and no other outputs, and runs from top to bottom."""

import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from fooddiff.api import SHIPPED

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "fooddiff.ipynb"

FEWER = "--config.train.batch_size=16 --config.sample.steps=4"  # which makes its training shorter


def test_its_outputs_are_stripped_but_for_the_dishes():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["execution_count"] is None for cell in code)
    ((cell, output),) = ((cell, output) for cell in code for output in cell["outputs"])
    assert "weights" in cell["metadata"]["tags"]
    assert set(output["data"]) == {"image/png"}


@pytest.mark.slow
def test_it_runs():
    """With few steps, without its installation, and without what draws with weights that this version has not."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    left_out = {"install"} if SHIPPED.is_file() else {"install", "weights"}
    notebook.cells = [cell for cell in notebook.cells if not left_out & set(cell.metadata.get("tags", ()))]
    for cell in notebook.cells:
        cell.source = re.sub(r"\bsteps=20\b", "steps=4", cell.source)
        cell.source = cell.source.replace("train.steps=200", "train.steps=20 " + FEWER).replace("every=200", "every=20")
        cell.source = cell.source.replace("--count=20", "--count=4")
    nbclient.NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    print(said[-600:])
    assert "% of 80 are read as asked" in said
    assert "bits" in said
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == (3 if SHIPPED.is_file() else 1)
