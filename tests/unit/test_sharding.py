"""Spreading over devices changes no logits; XLA makes eight devices of the CPU in a child process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import kvjax
from kvjax import sharding
from kvjax.methods import METHODS, make
from tests.tiny_models import tiny

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found() -> dict:
    """What the child says of each case."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    run = subprocess.run(
        [sys.executable, TESTS / "sharding_child.py"],
        env=os.environ
        | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # it compiles much and computes little
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}


def test_every_method_gives_the_logits_of_one_device(found):
    assert set(METHODS) < set(found)
    ran = {name: case for name, case in found.items() if "refused" not in case}
    assert {"full", "streaming_llm", "snapkv", "quest", "snapkv+kivi4", "window", "h2o by chunks"} <= set(ran)
    for name, case in ran.items():
        assert case["error"] < 1e-3, name  # of logits of about 4; one device itself errs by 1e-5
        assert case["share"] < 1.01 / (2 if name == "h2o by chunks" else 4), name


def test_the_step_updates_its_state_in_place_and_gathers_nothing(found):
    steps = [case for case in found.values() if "aliased" in case]
    assert len(steps) >= 2
    for case in steps:
        assert case["aliased"] >= 1
        assert case["gathers"] == 0


def test_a_method_that_couples_heads_is_refused(found):
    coupled = {name for name, case in found.items() if case["couples"]}
    assert coupled == {"tova"}
    assert "ranks each KV head by itself on several devices, got TOVA(" in found["tova"]["refused"]


def test_unequal_budgets_are_refused(found):
    assert "have equal budgets, got (40, 40, 40, 41)" in found["snapkv, other table"]["refused"]


TWO = Mesh(np.asarray(jax.devices()[:1] * 2), ("x",))  # enough for checks


def test_unequal_slots_are_refused():
    with pytest.raises(ValueError, match=r"have equal slots on several devices, got \(4, 5\)"):
        sharding.check(TWO, make("full"), (4, 5))


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ValueError, match="equally many KV heads, got n_kv_heads=3 for 2 devices"):
        sharding.shard(tiny(n_kv_heads=3), TWO)


def test_a_mesh_of_two_axes_is_refused():
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
    with pytest.raises(ValueError, match="a mesh has one axis, got"):
        sharding.shard(tiny(), mesh)


def test_coupling_is_known_through_a_chain():
    assert kvjax.chain(make("tova", budget=4), make("kivi")).couples_heads
    assert not kvjax.chain(make("h2o", budget=4), make("kivi")).couples_heads


def test_parameters_are_split_as_in_megatron():
    specs = jax.tree.map(lambda s: s.spec, sharding.of_parameters(tiny().params, sharding.make_mesh()))
    layer = specs["layer_0"]
    assert [layer["attn"][name]["kernel"] for name in "qkvo"] == [P(None, "x")] * 3 + [P("x")]
    names = ("gate", "up", "down")
    assert [layer["ffn"][name]["kernel"] for name in names] == [P(None, "x")] * 2 + [P("x")]
    assert specs["embed"]["embedding"] == P("x")
    assert specs["final_norm"]["scale"] == layer["attn_norm"]["scale"] == P()
