"""The tuner and what reads its files, with a clock of our own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tune, tuning
from pallas_kernels.backend import Target, aim
from pallas_kernels.decode_attention import gpu
from pallas_kernels.decode_attention.specs import OP, DecodeSpec

SPEC = DecodeSpec(1, 4, 64, (64, 64), "float32")
AT = Target("gpu", "Some GPU 80GB", "forward")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "path", lambda op, device: tmp_path / op / f"{device}.json")
    monkeypatch.setattr(tune.tuning, "path", tuning.path)
    monkeypatch.setattr(tune, "input_sets", lambda spec: [spec.arrays(jax.random.key(0))])
    tuning.forget()
    yield tmp_path
    tuning.forget()


def clock(monkeypatch, cost):
    """Replaces compiling and timing: a program is the settings that it was traced with."""

    def traced(call, sets):
        with tuning.watch() as asked:
            jax.eval_shape(lambda x: call(x), sets[0])  # noqa: PLW0108  a new function is traced anew
        return asked["decode_attention"][0]

    monkeypatch.setattr(tune, "layers", traced)
    monkeypatch.setattr(tune, "race", lambda programs, samples: {"": (cost(programs[""][0]), 0.0)})


def test_a_tuned_case_is_stored_and_taken_from_then_on(folder, monkeypatch):
    (folder / "decode_attention").mkdir()
    tried = []

    def cost(chosen):
        tried.append(chosen)
        return abs(chosen.block - 128) + abs(chosen.warps - 8) + chosen.stages + chosen.programs / 1e4

    clock(monkeypatch, cost)
    with aim(AT):
        row = tune.tune(OP, dataclasses.replace(SPEC, full=True))
        tune.store("decode_attention", AT.device, row)
        assert row["settings"] == {"block": 128, "programs": 264, "warps": 8, "stages": 2}
        assert row["time_us"] < row["default_us"]
        assert len(set(tried)) == row["tried"] < len(list(OP.candidates(SPEC)))
        with tuning.watch() as asked:
            OP.call(**SPEC.arrays(jax.random.key(0)), **SPEC.options())
        assert asked["decode_attention"][0] == gpu.Settings(**row["settings"])
        tune.store("decode_attention", AT.device, row)
    stored = json.loads((folder / "decode_attention" / f"{AT.device}.json").read_text())
    assert len(stored["rows"]) == 1, "a case tuned again replaces its row"


def test_the_nearest_case_is_taken_and_words_must_match(folder):
    rows = [
        {"key": {"dtype": "bfloat16", "rows": 1000}, "settings": {"block": 32}},
        {"key": {"dtype": "bfloat16", "rows": 100000}, "settings": {"block": 128}},
    ]
    path = tuning.path("decode_attention", AT.device)
    path.parent.mkdir()
    path.write_text(json.dumps({"rows": rows}))
    with aim(AT):
        pick = lambda **key: tuning.settings("decode_attention", gpu.Settings(), **key).block  # noqa: E731
        assert pick(dtype="bfloat16", rows=3000) == 32
        assert pick(dtype="bfloat16", rows=30000) == 128
        assert pick(dtype="float32", rows=1000) == gpu.Settings().block


def test_settings_of_smaller_heads_are_not_taken(folder):
    (folder / "op").mkdir()
    rows = [{"key": {"head_dim": 128, "rows": 9}, "settings": {"block": 7}}]
    (folder / "op" / f"{AT.device}.json").write_text(json.dumps({"rows": rows}))
    with aim(AT):
        taken = [tuning.settings("op", gpu.Settings(), head_dim=d, rows=9).block for d in (64, 128, 256)]
    assert taken == [7, 7, gpu.Settings().block]


def test_a_gpu_without_settings_takes_those_of_the_same_chip(folder):
    (folder / "op").mkdir()

    def store(device: str, block: int, kind: str = "int8") -> None:
        path = folder / "op" / f"{device}.json"
        row = {"key": {"rows": 9, "kind": kind}, "settings": {"block": block}}
        path.write_text(json.dumps({"rows": [row]}))
        tuning.forget()

    def taken(device: str, kind: str = "int8") -> int:
        with aim(Target("gpu", device, "forward")):
            return tuning.settings("op", gpu.Settings(), rows=9, kind=kind).block

    store("NVIDIA H100 80GB HBM3", 7)
    like = ("NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe")
    others = ("NVIDIA A100-SXM4-80GB", "NVIDIA H20", "NVIDIA B200")
    assert [taken(device) for device in like] == [7, 7, 7]
    assert [taken(device) for device in others] == [gpu.Settings().block] * 3
    store("NVIDIA H200", 5)
    assert taken("NVIDIA H200") == 5
    assert taken("NVIDIA H100 80GB HBM3") == 7
    store("NVIDIA H200", 5, "int4")  # a file of its own does not hide what only the others have
    assert taken("NVIDIA H200") == 7
    assert taken("NVIDIA H100 80GB HBM3", "int4") == taken("NVIDIA GH200 480GB", "int4") == 5


def test_where_there_is_nothing_to_tune_on_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "tuned on a GPU or TPU, got platform 'cpu'" in capsys.readouterr().err


def test_an_unknown_op_is_refused(capsys):
    with aim(AT):
        assert tune.main(["decode_attenton"]) == 2
    assert "got ['decode_attenton']" in capsys.readouterr().err


@pytest.mark.parametrize("error", [NotImplementedError, jax.errors.JaxRuntimeError])
@pytest.mark.parametrize("when", ["layers", "race"])
def test_settings_that_do_not_run_lose(folder, monkeypatch, when, error):
    clock(monkeypatch, lambda chosen: 2.0 - (chosen.block == 64))
    right = getattr(tune, when)

    def fails(what, rest):
        out = right(what, rest)
        if (out if when == "layers" else what[""][0]).block != 64:
            raise error("out of shared memory")
        return out

    if when == "layers" or error is jax.errors.JaxRuntimeError:
        monkeypatch.setattr(tune, when, fails)
    with aim(AT):
        assert tune.tune(OP, SPEC)["settings"]["block"] == 64


def test_an_op_is_traced_once_for_all_that_call_it_alike_until_settings_change():
    traced = []

    def double(x, *, times):
        traced.append(times)
        return x * times

    def twice(x):
        for _ in range(2):
            x = dispatch.run("double", "reference", {"reference": double}, x, times=2)
        return x

    def program():
        return jax.jit(lambda x: twice(x))(jnp.ones(3))  # noqa: PLW0108  a new function is traced anew

    np.testing.assert_array_equal(program(), 4)
    program()
    assert traced == [2]
    with tuning.watch():
        program()
    assert traced == [2, 2]
    tuning.forget()
    program()
    assert traced == [2, 2, 2]
