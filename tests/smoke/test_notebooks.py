"""Runs the notebooks as a user would, at toy size: short texts, and a real model cut to few layers."""

import base64
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Compiling all 30 layers of SmolLM2 for a dozen programs would take a minute of every test run.
FEWER_LAYERS = """
import dataclasses
c = dataclasses.replace(c, n_layers=6, layer_windows=c.layer_windows[:6])
model = dataclasses.replace(model, config=c)
"""
PNG = b"\x89PNG"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert not cell.metadata  # no timings, no collapsed state
    assert set(notebook.metadata) == {"kernelspec", "language_info"}  # no version of someone's Python


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart after a run: the text and the figures of its cells, by their ids."""
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    loaded = [cell.id for cell in notebook.cells].index("load")
    notebook.cells.insert(loaded + 1, nbformat.v4.new_code_cell(FEWER_LAYERS))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import sys; print(sys.executable)", id="python"))
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "KVJAX_NOTEBOOK_TOY": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    folder = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder)
    client.execute(env=environment)
    texts, figures = {}, {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            texts[cell.id] = texts.get(cell.id, "") + output.get("text", "")
            if image := output.get("data", {}).get("image/png"):
                figures[cell.id] = base64.b64decode(image)
    return texts, figures


def test_quickstart_runs_in_this_python(quickstart):
    texts, _ = quickstart
    assert Path(texts["python"].strip()).samefile(sys.executable)


def test_quickstart_compares_three_methods_and_its_own(quickstart):
    texts, figures = quickstart
    full_mb = float(re.search(r"full cache: ([\d.]+) MB, perplexity [\d.]+", texts["measure"])[1])
    rows = re.findall(
        r"(\w+) +([\d.]+) MB +KL ([\d.]+) +perplexity ([\d.]+)", texts["compare"] + texts["own"]
    )
    assert [row[0] for row in rows] == ["streaming_llm", "knorm", "snapkv", "long_values"]
    for _, mb, kl, perplexity in rows:
        assert 0.4 * full_mb < float(mb) < 0.6 * full_mb  # the budget is half of the context
        assert 0 < float(kl) < 10
        assert 1 < float(perplexity) < np.inf
    for name in ("plot", "own"):
        assert figures[name].startswith(PNG)
        assert len(figures[name]) > 5000


def test_quickstart_generates_and_composes(quickstart):
    texts, _ = quickstart
    assert texts["generate"].strip()
    assert texts["own-generate"].strip()
    share = float(re.search(r"([\d.]+)% of the full cache", texts["chain"])[1])
    assert 10 < share < 30  # a quarter of the tokens in 4 bits, all of them still in the exact window
