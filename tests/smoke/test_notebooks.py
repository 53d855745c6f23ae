"""Runs the notebooks as a user would, at toy size: short texts, and a real model cut to few layers."""

import base64
import functools
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
c = dataclasses.replace(c, n_layers=3, layer_windows=c.layer_windows[:3])
model = dataclasses.replace(model, config=c)
"""
PNG = b"\x89PNG"
FIGURES = {
    "quickstart": {"plot", "own"},
    "calibrate_a2ats": {"share", "losses", "held", "plot"},
    "calibrate_chess": {"channels", "plot"},
    "long_context": {"plot"},
}


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


def test_notebooks_install_alike():
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    assert len({cell.source for cell in cells if cell.id == "install"}) == 1


def run(path, folder):
    """Runs a notebook in a folder, and returns the text and the figures of its cells, by their ids."""
    notebook = nbformat.read(path, as_version=4)
    loaded = [cell.id for cell in notebook.cells].index("load")
    notebook.cells.insert(loaded + 1, nbformat.v4.new_code_cell(FEWER_LAYERS))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import sys; print(sys.executable)", id="python"))
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "KVJAX_NOTEBOOK_TOY": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # they compile much and compute little
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env=environment)
    texts, figures = {}, {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            texts[cell.id] = texts.get(cell.id, "") + output.get("text", "")
            if image := output.get("data", {}).get("image/png"):
                figures[cell.id] = base64.b64decode(image)
    return texts, figures


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A function that says what the notebook of a name gave; each runs once."""
    return functools.cache(
        lambda name: run(ROOT / "notebooks" / f"{name}.ipynb", tmp_path_factory.mktemp(name))
    )


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_notebooks_run_in_this_python_and_draw(ran, name):
    texts, figures = ran(name)
    assert Path(texts["python"].strip()).samefile(sys.executable)
    assert figures.keys() == FIGURES[name]
    for figure in figures.values():
        assert figure.startswith(PNG)
        assert len(figure) > 5000


def test_quickstart_compares_three_methods_and_its_own(ran):
    texts, _ = ran("quickstart")
    full_mb = float(re.search(r"full cache: ([\d.]+) MB, perplexity [\d.]+", texts["measure"])[1])
    rows = re.findall(
        r"(\w+) +([\d.]+) MB +KL ([\d.]+) +perplexity ([\d.]+)", texts["compare"] + texts["own"]
    )
    assert [row[0] for row in rows] == ["streaming_llm", "knorm", "snapkv", "long_values"]
    for _, mb, kl, perplexity in rows:
        assert 0.4 * full_mb < float(mb) < 0.6 * full_mb  # the budget is half of the context
        assert 0 < float(kl) < 10
        assert 1 < float(perplexity) < np.inf


def test_quickstart_generates_and_composes(ran):
    texts, _ = ran("quickstart")
    assert texts["generate"].strip()
    assert texts["own-generate"].strip()
    share = float(re.search(r"([\d.]+)% of the full cache", texts["chain"])[1])
    assert 10 < share < 30  # a quarter of the tokens in 4 bits, all of them still in the exact window


def test_calibration_lowers_what_it_is_of(ran):
    texts, _ = ran("calibrate_a2ats")
    assert "codewords: (3, 3, 32, 64)" in texts["calibrate"]
    losses, held = (int(re.search(r"(\d+)% of the", texts[cell])[1]) for cell in ("losses", "held"))
    assert 10 < losses < 100
    assert 10 < held <= 100  # the codewords of k-means are among the candidates


def test_calibrated_a2ats_reads_less_and_predicts_nearly_the_same(ran):
    texts, _ = ran("calibrate_a2ats")
    rows = re.findall(r"(\w+) +([\d.]+) +holds \d+% +reads +([\d.]+)% +KL ([\d.]+)", texts["compare"])
    assert [row[:2] for row in rows] == [("ranked", "0.12"), ("newest", "64"), ("newest", "32")]
    (ranked, *_), (kl, alone, narrow) = zip(*[(float(row[2]), float(row[3])) for row in rows], strict=True)
    assert 57 < ranked < 100  # window and sinks alone are 72 of 128 tokens
    assert kl < alone < narrow
    answers = dict(re.findall(r"(\w+) +(.+)", texts["generate"]))
    assert answers.keys() == {"full", "few", "newest"}


def test_codebooks_are_loaded_and_those_of_another_model_refused(ran):
    texts, _ = ran("calibrate_a2ats")
    assert texts["load-books"].endswith("True True\n")
    whole, small = map(float, re.findall(r"([\d.]+) MB", texts["save"]))
    assert small < whole
    assert "codebooks belong to one model, got those of another" in texts["refuse-model"]
    assert "a folder holds one calibration, got another settings" in texts["refuse-folder"]


def test_calibrated_chess_is_as_sparse_as_asked_and_refuses_others(ran):
    texts, _ = ran("calibrate_chess")
    sparsity = float(re.search(r"([\d.]+)% are left out", texts["channels"])[1])
    assert 40 < sparsity < 60  # of 64 tokens
    rows = re.findall(r"(\S+) +50% +KL ([\d.]+)", texts["methods"])
    assert [name for name, _ in rows] == ["CATS", "CHESS", "CHESS+"]
    assert all(0 < float(kl) < 10 for _, kl in rows)
    assert re.search(r"KL on text that was held out: [\d.]+ before 2 steps", texts["refine"])
    assert "Chess(sparsity=0.5" in texts["save"]
    assert "a folder holds one method" in texts["save"]
    assert "thresholds are of one model" in texts["save"]


def test_a_context_is_closed_opened_and_repaired(ran):
    texts, _ = ran("long_context")
    assert "the device holds abstracts, positions, masses and what a step may read" in texts["method"]
    whole, _, host, files = map(float, re.findall(r"([\d.]+) MB", texts["read"]))
    assert host < 0.5 * whole < files
    asked, pooled, coming, share = map(float, re.findall(r"([\d.]+)(?: chunks|%)", texts["steps"]))
    assert asked > 0
    assert 0 < pooled <= 100
    assert pooled + coming <= 101
    assert 0 < share < 100
    assert 0 < float(re.search(r"([\d.]+) nats", texts["compare"])[1]) < 10
    assert texts["open"].count("names are") == texts["open"].count("A class is") == 1
    assert "a context is of one method" in texts["damage"]
    assert "of KV head" in texts["damage"]
