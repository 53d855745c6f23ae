"""A decode loop needs no memory of its own for each layer: compiled for a GPU, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.topology import environment

TESTS = Path(__file__).parents[1]
METHODS = ("full", "chelsea:budget=512", "streaming_llm:budget=512")


@pytest.mark.interpreted
def test_temporaries_of_layers_do_not_live_at_once():
    path = os.pathsep.join([str(TESTS.parent), str(Path(sys.prefix) / "compilers"), *sys.path])
    run = subprocess.run(
        [sys.executable, TESTS / "step_child.py", *METHODS],
        env=os.environ | environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    lines = list(map(json.loads, run.stdout.splitlines()))
    assert [line["name"] for line in lines] == list(METHODS)
    for line in lines:
        temps, states = line["temp_bytes"], line["state_bytes"]
        assert temps[1] - temps[0] < 0.1 * (states[1] - states[0]), line
