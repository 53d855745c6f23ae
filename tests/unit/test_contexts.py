"""A context that is saved comes back bit by bit or not at all, whatever happens to the writer or the disk."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given
from method_cases import CASES, MODELS, ONE_LAYER, fitted

import kvjax
from kvjax import blocks, context_folder, context_layers, contexts
from kvjax.blocks import DamagedBlock
from kvjax.contexts import load_context, save_context

MODEL = MODELS["G2"]
FULL = kvjax.METHODS["full"]()
IDS = np.random.default_rng(0).integers(0, 90, (2, 40)).astype(np.int32)
TESTS = Path(__file__).parents[1]


def read(method, ids=IDS, model=MODEL):
    """A state after a prompt and a step, and the logits there."""
    logits, state = kvjax.prefill(model, ids, method, room=8)
    return kvjax.decode_step(model, logits.argmax(-1), state, method)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(context_layers, "_BLOCK_BYTES", 1000)
        yield


@pytest.fixture(scope="module")
def state():
    return read(FULL)[1]


@pytest.fixture(scope="module")
def saved(state, _small_blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_context(folder, MODEL, FULL, state, IDS)
    return folder


@pytest.mark.parametrize("name", [name for name, method in CASES.items() if method.tier == "device"])
def test_a_state_of_any_method_goes_on_as_if_it_had_stayed(name, tmp_path):
    model, method = ONE_LAYER, fitted(CASES[name], ONE_LAYER)
    logits, state = read(method, model=model)
    save_context(tmp_path, model, method, state)
    found = load_context(tmp_path, model, method)
    assert found.tokens is None
    assert same(found.state, state)
    forced = np.full((2, 3), -1)
    ours = kvjax.decode(model, logits, found.state, method, forced, keep_logits=True)[3]
    theirs = kvjax.decode(model, logits, state, method, forced, keep_logits=True)[3]
    np.testing.assert_array_equal(ours, theirs)


def test_a_new_context_takes_the_place_of_the_old_one(state, tmp_path):
    for ids in (IDS, IDS[:, ::-1].copy()):
        save_context(tmp_path, MODEL, FULL, read(FULL, ids)[1], ids)
    np.testing.assert_array_equal(load_context(tmp_path, MODEL, FULL).tokens, IDS[:, ::-1])
    assert not same(load_context(tmp_path, MODEL, FULL).state, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "lock", "manifest.json"]


@given(st.data())
def test_a_flipped_bit_is_noticed_or_changes_nothing(state, saved, data):
    path = data.draw(st.sampled_from(sorted(p for p in saved.rglob("*") if p.is_file() and p.name != "lock")))
    raw = path.read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    in_head = path.name != "manifest.json" and blocks.ALIGN <= place < blocks.stride_of(1000)
    try:
        if in_head or (path.name == "manifest.json" and raw[place : place + 1].isspace()):
            return  # what pads the first block, or a space between words: says nothing
        with pytest.raises(ValueError, match=path.name):
            load_context(saved, MODEL, FULL)
    finally:
        path.write_bytes(raw)


def damaged(saved, tmp_path, change):
    """What is said of a context whose second layer's file was changed."""
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    change(folder / "00000001" / "001.blocks")
    with pytest.raises(DamagedBlock) as error:
        load_context(folder, MODEL, FULL)
    return str(error.value)


def test_damage_is_named(saved, tmp_path):
    stride = blocks.stride_of(1000)

    def put(path, place, what):
        raw = bytearray(path.read_bytes())
        raw[place : place + len(what)] = what
        path.write_bytes(raw)

    found = damaged(saved, tmp_path / "a", lambda path: put(path, 3 * stride + 5, b"?"))
    assert "checksum" in found
    assert "block 2 of" in found
    assert "001.blocks" in found
    first = (saved / "00000001" / "000.blocks").read_bytes()
    other = damaged(saved, tmp_path / "b", lambda path: put(path, stride, first[2 * stride : 3 * stride]))
    assert "its own place" in other
    cut = damaged(saved, tmp_path / "c", lambda path: path.write_bytes(path.read_bytes()[:-10]))
    assert "cut short" in cut
    assert "none at" in damaged(saved, tmp_path / "d", Path.unlink)
    shorter = damaged(saved, tmp_path / "e", lambda path: path.write_bytes(path.read_bytes()[: 2 * stride]))
    assert "cut short" in shorter


def test_what_belongs_to_others_is_refused(saved, state, tmp_path):
    with pytest.raises(ValueError, match="one model"):
        load_context(saved, MODELS["G1 with a window"], FULL)
    with pytest.raises(ValueError, match="one method"):
        load_context(saved, MODEL, kvjax.METHODS["tova"](budget=16))
    with pytest.raises(FileNotFoundError, match="a folder of save_context"):
        load_context(tmp_path, MODEL, FULL)
    for name in ("format", "byte_order"):
        about = json.loads((saved / "manifest.json").read_text())["about"]
        context_folder.write_manifest(tmp_path, about | {name: "other"})
        with pytest.raises(ValueError, match=f"a context is of one {name.replace('_', ' ')}"):
            load_context(tmp_path, MODEL, FULL)
    about["layers"][0]["leaves"][0][1] = "float16"
    context_folder.write_manifest(
        tmp_path, about | {"format": context_folder._FORMAT, "byte_order": sys.byteorder}
    )
    with pytest.raises(ValueError, match="the arrays that its method makes"):
        load_context(tmp_path, MODEL, FULL)
    hosted = CASES["a2ats, host"]
    with pytest.raises(ValueError, match='take tier="device"'):
        save_context(tmp_path, MODEL, hosted, read(hosted)[1])


def test_one_process_writes(state, tmp_path):
    save_context(tmp_path, MODEL, FULL, state)
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="one process writes"):
            save_context(tmp_path, MODEL, FULL, state)
        assert same(load_context(tmp_path, MODEL, FULL).state, state)  # readers do not wait


@pytest.mark.parametrize("after", [0, 1, 7, 30])
def test_a_full_disk_leaves_the_old_context(state, saved, tmp_path, monkeypatch, after):
    folder = tmp_path / "full"
    shutil.copytree(saved, folder)
    write, left = os.pwrite, after

    def refuses(handle, data, place):
        nonlocal left
        if left == 0:
            raise OSError(28, "No space left on device")
        left -= 1
        return write(handle, data[: max(1, len(data) // 2)], place)  # a part at a time

    monkeypatch.setattr(blocks.os, "pwrite", refuses)
    with pytest.raises(OSError, match="No space"):
        save_context(folder, MODEL, FULL, read(FULL, IDS[:, ::-1].copy())[1])
    monkeypatch.undo()
    assert same(load_context(folder, MODEL, FULL).state, state)
    assert [path.name for path in context_folder.generations(folder)] == ["00000001"]


def test_too_small_a_disk_is_told_before_anything_is_written(state, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(contexts.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="fits its disk"):
        save_context(tmp_path, MODEL, FULL, state)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_writer_that_is_killed_leaves_the_old_context_or_the_new(tmp_path):
    """At 50 places: each write, sync and rename of a save is the last one of some process."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])
    run = subprocess.run(
        [sys.executable, TESTS / "context_child.py", tmp_path],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    assert found["killed"] == 50
    assert found["old"] + found["new"] == 50
    assert min(found["old"], found["new"]) > 0


def test_what_else_is_in_a_folder_stays(tmp_path):
    kept = [tmp_path / "2024" / "a.txt", tmp_path / "20240131" / "b.txt", tmp_path / "lock"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    state = read(FULL)[1]
    for _ in range(2):
        save_context(tmp_path, MODEL, FULL, state, IDS)
    assert [path.read_text() for path in kept] == ["mine"] * 3
    assert same(load_context(tmp_path, MODEL, FULL).state, state)
    assert [path.name for path in context_folder.generations(tmp_path)] == ["20240133"]
