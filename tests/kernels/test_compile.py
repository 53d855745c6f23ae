"""Compiles every op and spec for TPUs and GPUs that are not here, in child processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.registry import ops
from pallas_kernels.topology import DEVICES, Described, environment

HERE = Path(__file__).parent
COMPILERS = Path(sys.prefix) / "compilers"  # where `make test` puts libtpu and the CUDA plugin


# The newest JAX compiles for all, an older one for one of each platform: its tests have half the time.
NEWEST = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)


# All are compiled for the least memory of each platform; for the others, every so manieth of the small ones.
LARGE = ("v5e", "l4")
PARTS = {"v6e": "3", "h100": "3", "v5p": "6", "a100": "6"}


@pytest.mark.parametrize("device", DEVICES if NEWEST else ("v5e", "h100"))
def test_every_kernel_compiles(device):
    if not COMPILERS.exists():
        pytest.fail(f"compilers are in {COMPILERS.name}/ of the environment, got none: run `make test`")
    path = os.pathsep.join(map(str, (HERE.parents[1], COMPILERS)))
    uses = () if device in LARGE else ("test", PARTS[device])
    run = subprocess.run(
        [sys.executable, HERE / "compile_child.py", device, *uses],
        env=os.environ | environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    timed = {spec.name: spec.bytes() for spec in ops()["decode_attention"].specs if "bench" in spec.uses}
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 0, run.stderr[-4000:]
    platform = Described(device).platform
    asked = [
        [spec for spec in op.specs if platform in spec.platforms and (not uses or uses[0] in spec.uses)]
        for op in ops().values()
    ]
    assert len(lines) == sum(len(specs[:: int(uses[1]) if uses else 1]) for specs in asked)
    broken = [line for line in lines if "error" in line]
    assert not broken, json.dumps(broken, indent=1)
    refused = {(line["op"], line["spec"]) for line in lines if "refused" in line}
    assert refused <= {(op, spec) for op, spec in refused if "float16" in spec.split("-")}, refused
    if NEWEST and platform == "tpu" and not uses:
        assert {line["op"] for line in lines if line.get("host_bytes")} == {"fetch_rows", "stow_rows"}
    for line in lines:  # no copy of keys and values
        if line["op"] == "decode_attention" and line["spec"] in timed:
            assert line["temp_bytes"] < timed[line["spec"]] / 10, line
