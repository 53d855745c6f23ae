"""Compiles programs with K and V off the device for devices that are not here, in child processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.registry import ops
from pallas_kernels.topology import environment

TESTS = Path(__file__).parents[1]
NEWEST = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)


def for_tpu(device, names):
    """What XLA makes of each program for a TPU."""
    path = os.pathsep.join([str(TESTS.parent), str(Path(sys.prefix) / "compilers"), *sys.path])
    run = subprocess.run(
        [sys.executable, TESTS / "host_child.py", device, *names],
        env=os.environ | environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found = {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert found.keys() == names
    return found


@pytest.mark.skipif(not NEWEST, reason="before JAX 0.12 a shape is of no memory, so none lies on the host")
@pytest.mark.parametrize(
    ("device", "names"),
    [
        (
            "v5e",
            {"chunk of a prompt", "step", "steps", "flush", "flush of a chunk", "steps with abstracts"}
            | {"flush of abstracts"},
        ),
        ("v5p", {"steps", "flush"}),
        ("v6e", {"steps", "flush"}),
    ],
)
def test_programs_compile_for_a_tpu_and_leave_the_rows_on_its_host(device, names):
    for name, line in for_tpu(device, names).items():
        assert line["far_bytes"] > 0
        for kind in ("argument", "output", "alias"):  # nothing but the rows, in place
            assert line[f"host_{kind}_bytes"] == line["far_bytes"]
        assert line["host_temp_bytes"] == 0
        if name.startswith("step"):
            assert line["taken"] == kernels(line["taken"], "tpu")
        if name != "chunk of a prompt":  # which reads all rows of a layer
            assert line["temp_bytes"] < 0.6 * line["far_bytes"]


def kernels(names, platform):
    """What each of these ops is to run as: the reference where a platform has no kernel."""
    return {name: platform if platform in ops()[name].platforms else "reference" for name in names}


@pytest.mark.skipif(not NEWEST, reason="the compiler for TPUs is the newest JAX's")
def test_steps_with_a_disk_compile_for_a_tpu():
    (line,) = for_tpu("v5e", {"steps with a disk"}).values()
    assert line["far_bytes"] == line["host_argument_bytes"] == 0  # nothing of it is an array
    assert line["taken"] == kernels(line["taken"], "tpu")


@pytest.fixture(scope="module")
def for_h100():
    """What XLA makes of each program for an H100, with the host's arrays as parameters."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, Path(sys.prefix) / "compilers")))
    run = subprocess.run(
        [sys.executable, TESTS / "host_gpu_child.py"], env=os.environ | environment() | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {(line["name"], line["bits"]): line for line in lines}


@pytest.mark.parametrize("bits", [None, 8])
def test_programs_for_a_gpu_write_to_the_host_in_place_and_copy_little_of_it(for_h100, bits):
    flush, decode, read = (for_h100[name, bits] for name in ("flush", "decode", "read"))
    one = 8 * 2048 * 128 * 2 * (2 if bits is None else 1)  # bytes of a layer's keys on the host
    assert {"fetch_rows", "sparse_decode_attention"} <= decode["taken"].keys()
    for line, n_layers in ((flush, 1), (decode, 6), (read, 6)):
        assert set(line["taken"].values()) <= {"gpu"}
        for kind in ("argument", "output", "alias"):
            assert line[f"host_{kind}_size_in_bytes"] == 2 * n_layers * one
        assert line["host_temp_size_in_bytes"] == 0
    assert flush["host_copies"] == decode["host_copies"] == 0  # rows cross the bus inside kernels
    assert read["host_copies"] == 6
    layer = 2 * 2 * 8 * 2048 * 128 * 2  # bytes of one layer on the device
    assert read["temp_size_in_bytes"] < 1.5 * 6 * layer  # a prompt reads layer by layer: all at once, 2.6


def test_abstracts_on_the_host_are_written_in_place_and_copied_layer_by_layer(for_h100):
    decode, flush = (for_h100[name, None] for name in ("decode with abstracts", "flush of abstracts"))
    one = 2 * 8 * 2048 // 16 * 128 * 2  # bytes of a layer's middles: rows, heads, leaves
    rows = 2 * 2 * 8 * 2048 * 128 * 2
    for line, size in ((flush, one), (decode, 6 * (rows + one))):
        assert set(line["taken"].values()) == {"gpu"}
        for kind in ("argument", "output", "alias"):
            assert line[f"host_{kind}_size_in_bytes"] == size
        assert line["host_temp_size_in_bytes"] == 0
    assert flush["host_copies"] == 0
    assert decode["host_copies"] == 6  # in the loop: each step copies the middles of each layer
    assert decode["temp_size_in_bytes"] < 3 * one  # of a layer, as they are and in float32, and no more
