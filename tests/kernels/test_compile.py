"""Compiles every op and spec for TPUs and GPUs that are not here, in child processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.registry import ops
from pallas_kernels.topology import DEVICES, environment

HERE = Path(__file__).parent
COMPILERS = Path(sys.prefix) / "compilers"  # where `make setup` puts libtpu and the CUDA plugin


@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_compiles(device):
    path = os.pathsep.join(map(str, (HERE.parents[1], COMPILERS)))
    run = subprocess.run(
        [sys.executable, HERE / "compile_child.py", device],
        env=os.environ | environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 0, run.stderr[-4000:]
    assert len(lines) == sum(len(op.specs) for op in ops().values())
    broken = [line for line in lines if "error" in line]
    assert not broken, json.dumps(broken, indent=1)
