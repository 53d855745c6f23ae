"""Steps that leave activations out, and one that learns which, compile for a GPU and a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.topology import environment

TESTS = Path(__file__).parents[1]


@pytest.mark.interpreted
@pytest.mark.parametrize(("device", "platform"), [("h100", "gpu"), ("v5e", "tpu")])
def test_sparse_steps_compile(device, platform):
    path = os.pathsep.join([str(TESTS.parent), str(Path(sys.prefix) / "compilers"), *sys.path])
    run = subprocess.run(
        [sys.executable, TESTS / "sparse_child.py", device],
        env=os.environ | environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    refinement, *lines = map(json.loads, run.stdout.splitlines())
    # The library has the gradient of attention, and the reference that of writing in place.
    append = "gpu" if platform == "gpu" else "reference"
    assert refinement["taken"] == {"prefill_attention": platform, "append_rows": append}
    assert len(lines) == 8
    for line in lines:
        name, codes, taken = line["name"], line["codes"], line["taken"]
        assert taken.get("spvmm") == (platform if codes or name != "dense" else None), line
        assert taken.get("spvmm_each") == (platform if name in ("chess+", "teal") else None), line
        assert taken.get("gate_up") == (platform if name == "chess+" else None), line
        assert taken.get("vmmsp") == (platform if name == "groups" else None), line
