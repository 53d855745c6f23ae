"""Rows on a disk are read as if they had stayed, through any tier, and never wrong: or the chunk is named."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import threading
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from method_cases import MODELS

import kvjax
from kvjax import blocks, chunk_pool, disk, reading, tiers
from kvjax.blocks import DamagedBlock
from kvjax.chunk_codes import bytes4
from kvjax.chunk_files import Layout
from kvjax.chunk_store import Store
from kvjax.contexts import load_context, recover_context, save_context
from kvjax.disk_pace import Pace
from kvjax.disk_threads import Threads
from kvjax.methods import layers
from kvjax.methods.leoam import LeoAM
from pallas_kernels.host import on_host

MODEL = MODELS["G2"]
IDS = np.random.default_rng(0).integers(0, 90, (2, 90)).astype(np.int32)
IDS[0, :9] = -1
SIZES = {"leaf": 4, "root": 16, "window": 8, "n_sinks": 4}


def on_disk(folder, **more):
    return LeoAM(**{"topk": 0.1, "chunk": 8, **SIZES, **more}, disk=str(folder))


def read(method, steps=24, room=44):
    """Logits of steps after a prompt, and the state."""
    logits, state = kvjax.prefill(MODEL, IDS, method, room=room, chunk=32)
    forced = np.random.default_rng(1).integers(0, 90, (2, steps)).astype(np.int32)
    _, logits, state, kept = kvjax.decode(MODEL, logits, state, method, forced, keep_logits=True)
    return np.asarray(kept), logits, state


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Logits where the host holds all; the device's programs gather otherwise, so they differ by rounding."""
    kept = read(on_disk(tmp_path_factory.mktemp("plain")))[0]
    np.testing.assert_allclose(kept, read(LeoAM(topk=0.1, **SIZES))[0], atol=1e-4)
    return kept


@pytest.mark.parametrize(
    "more",
    [
        {"ahead": False},
        {"device_budget": 180_000, "host_budget": 70_000},
        {"host_budget": 100_000, "chunk": 32},
        {"device_budget": 180_000, "host_budget": 70_000, "abstracts": "host", "root": None},
    ],
)
def test_any_budgets_give_the_same_bits(tmp_path, plain, more):
    kept, _, state = read(on_disk(tmp_path, **more))
    np.testing.assert_array_equal(kept, plain)
    moved = disk.traffic(state)
    assert sum(t.asked for t in moved) > 50
    assert (sum(t.read_bytes for t in moved) > 0) == ("host_budget" in more)
    assert (sum(t.expected for t in moved) > 0) <= ("ahead" not in more)


def test_a_budget_of_all_is_dense_attention_through_the_disk(tmp_path):
    full = read(kvjax.METHODS["full"]())[0]
    kept, _, state = read(on_disk(tmp_path, topk=1.0, host_budget=70_000))
    np.testing.assert_array_equal(kept, full)
    assert tiers.hit_rate(state) < 1


@pytest.mark.parametrize(
    ("leaf", "chunk", "tokens"), [(4, None, 32), (24, None, 48), (64, None, 64), (8, 16, 16)]
)
def test_a_chunk_has_whole_leaves_and_no_more_than_it_must(leaf, chunk, tokens):
    method = LeoAM(leaf=leaf, chunk=chunk, disk="nowhere")
    kv = method.init(layers(MODEL.config)[0], 1, (192,) * MODEL.config.n_kv_heads, np.float32)
    assert disk.layout_of(kv).chunk == tokens


def test_what_the_next_layer_asks_for_is_read_before_it_does(tmp_path):
    found = {}
    for ahead in (True, False):
        state = read(on_disk(tmp_path, ahead=ahead, host_budget=300_000, device_budget=180_000))[2]
        found[ahead] = sum(t.expected for t in disk.traffic(state))
    assert found[True] > 5
    assert found[False] == 0


LAYOUT = Layout(batch=2, n_heads=3, slots=100, head_dim=64, dtype=np.dtype(np.float32), chunk=16)
ROWS = np.random.default_rng(2).normal(size=(2, 3, 100, 2, 64)).astype(np.float32)


def store(folder, n_pool, *, int4=False, threads=4):
    files = (
        blocks.create(folder / "a", LAYOUT.chunk_bytes, 1),
        blocks.create(folder / "b", bytes4(LAYOUT.rows), 1) if int4 else None,
    )
    return Store(LAYOUT, n_pool, files, Threads(threads), Pace())


def append(one, n):
    end = np.minimum(one.end + n, LAYOUT.slots)
    rows = [
        np.pad(ROWS[b, k, one.end[b, k] : end[b, k]], [(0, n)] + [(0, 0)] * 2)[:n]
        for b in range(2)
        for k in range(3)
    ]
    one.append(one.end.copy(), np.stack(rows).reshape(2, 3, n, 2, 64), end)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_a_store_gives_back_what_it_was_given(tmp_path_factory, data):
    one = store(tmp_path_factory.mktemp("store"), data.draw(st.integers(1, 40)))
    size = data.draw(st.sampled_from([1, 4, 16]))
    for _ in range(data.draw(st.integers(1, 8))):
        append(one, data.draw(st.integers(1, 40)))
        asked = data.draw(st.lists(st.integers(-1, 99 // size), min_size=1, max_size=30))
        leaf = np.asarray(asked)
        row, head = np.arange(len(leaf)) % 2, np.arange(len(leaf)) % 3
        if data.draw(st.booleans()):
            one.expect(row, head, leaf[::-1], size)
        found = one.read(row, head, leaf, size)
        for i, n in enumerate(leaf):
            end = min((n + 1) * size, one.end[row[i], head[i]])
            if n >= 0 and n * size < end:
                np.testing.assert_array_equal(
                    found[i, : end - n * size], ROWS[row[i], head[i], n * size : end]
                )
    for b, k in np.ndindex(2, 3):
        np.testing.assert_array_equal(one.everything()[b, k, : one.end[b, k]], ROWS[b, k, : one.end[b, k]])
    one.sync()
    one.close()


def test_what_is_waited_for_does_not_queue_behind_what_is_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_pool, "_ALONE", 1000)  # so that threads copy as well
    one, gate = store(tmp_path, 6, threads=2), threading.Event()
    append(one, 100)
    one.sync()
    for _ in range(2):
        one._threads.behind.submit(gate.wait)
    one.expect(np.zeros(2, int), np.zeros(2, int), np.arange(2), 16)  # has no thread yet
    row, head, leaf = np.ones(4, int), np.arange(4) % 3, np.array([0, 1, 2, 5])
    timer = threading.Timer(20, gate.set)
    timer.start()
    found = one.read(row, head, leaf, 16)
    assert not gate.is_set()
    for i in range(4):
        np.testing.assert_array_equal(found[i], ROWS[1, head[i], 16 * leaf[i] : 16 * leaf[i] + 16])
    gate.set()
    timer.cancel()
    one.close()


def test_neighbours_are_read_at_once_and_each_is_checked(tmp_path, monkeypatch):
    one, reads, preadv = store(tmp_path, 6), [], os.preadv
    append(one, 100)  # 6 full chunks of each head
    one.sync()
    monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args[2]) or preadv(*args))
    numbers = [LAYOUT.number(1, 2, chunk) for chunk in (0, 1, 2, 4, 5)]  # 3 is left out
    found = np.zeros((5, *LAYOUT.rows), LAYOUT.dtype)
    one.files.copy(numbers, np.arange(5)[::-1], found)
    assert len(reads) == 2
    for chunk, rows in zip((0, 1, 2, 4, 5), found[::-1], strict=True):
        np.testing.assert_array_equal(rows, ROWS[1, 2, 16 * chunk : 16 * chunk + 16])
    flipped(tmp_path / "a", (numbers[1] + 1) * LAYOUT.stride + 50)
    with pytest.raises(DamagedBlock, match="tokens 16 to 31 of KV head 2, row 1"):
        one.files.copy(numbers, np.arange(5), found)
    one.close()


def test_four_bits_err_by_half_a_step_at_most_and_are_taken_as_time_asks(tmp_path):
    one = store(tmp_path, 6, int4=True)
    append(one, 100)
    one.sync()
    row, head, leaf = (x.reshape(-1) for x in np.indices((2, 3, 6)))
    seen = []
    for compute_s in (10.0, 0.0):
        one.pace.rate, one.pace.compute_s, one.pace._left = 1e9, compute_s, None
        before = one.traffic.read4_bytes
        found = one.read(row[:6], head[:6], leaf[:6], 16)
        found = one.read(row[-6:], head[-6:], leaf[-6:], 16)
        seen.append(one.traffic.read4_bytes - before)
        true = ROWS.reshape(2, 3, 100, 2, 64)[row[-6:], head[-6:]][:, :96].reshape(6, 6, 16, 2, 64)
        true = true[np.arange(6), leaf[-6:]]
        step = (true.max(-1) - true.min(-1))[..., None] / 15
        assert (np.abs(found - true) <= step / 2 + 1e-6).all()
        assert compute_s == 0 or (found == true).all()
    assert seen[0] == 0 < seen[1]
    np.testing.assert_array_equal(one.everything()[:, :, :96], ROWS[:, :, :96])  # prompts read it as it was
    one.close()


def test_slots_follow_each_other(tmp_path):
    one = store(tmp_path, 4)
    with pytest.raises(ValueError, match="slots follow each other"):
        one.append(np.full((2, 3), 5), ROWS[:, :, :3], np.full((2, 3), 8))


def flipped(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


def test_a_damaged_chunk_is_named_and_its_tokens_read_anew(tmp_path):
    method = on_disk(tmp_path, host_budget=40_000, topk=1.0)  # so that steps read as prompts do
    _, logits, state = read(method)
    tokens = np.concatenate([IDS, np.random.default_rng(1).integers(0, 90, (2, 24))], axis=1)
    save_context(tmp_path, MODEL, method, state, tokens)
    ours = kvjax.decode(MODEL, logits, state, method, np.full((2, 5), 7), keep_logits=True)[3]
    disk.Disk.by_folder[tmp_path.resolve()].close()
    path = tmp_path / "00000001" / "001.chunks"
    stride = blocks.stride_of(8 * 2 * 16 * 4)
    flipped(path, 3 * stride + 100)
    state = load_context(tmp_path, MODEL, method).state
    with pytest.raises(DamagedBlock, match=r"tokens 16 to 23 of KV head 0, row 0: .*checksum.*001\.chunks"):
        kvjax.prefill(MODEL, np.full((2, 3), 7), method, state=state, room=1)
    found = load_context(tmp_path, MODEL, method, repair=True)
    assert "tokens 16 to 23 of KV head 0" in found.repaired
    assert found.state[0].seen.tolist() == [105, 114]
    theirs = kvjax.decode(MODEL, logits, found.state, method, np.full((2, 5), 7), keep_logits=True)[3]
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert load_context(tmp_path, MODEL, method, repair=True).repaired is None


def test_damage_without_tokens_is_refused(tmp_path):
    method = on_disk(tmp_path)
    save_context(tmp_path, MODEL, method, read(method)[2])
    disk.Disk.by_folder[tmp_path.resolve()].close()
    flipped(tmp_path / "00000001" / "000.chunks", 5000)
    with pytest.raises(DamagedBlock, match="tokens 0 to 7 of KV head 0, row 0"):
        load_context(tmp_path, MODEL, method, repair=True)
    (tmp_path / "00000001" / "001.chunks").unlink()
    with pytest.raises(DamagedBlock, match="got none at"):
        load_context(tmp_path, MODEL, method)


@pytest.mark.parametrize("where", [{}, {"abstracts": "host", "root": None}])
def test_a_context_is_opened_with_other_budgets_and_goes_on(tmp_path, where):
    method = on_disk(tmp_path, **where)
    _, logits, state = read(method)
    save_context(tmp_path, MODEL, method, state)
    forced = np.full((2, 15), -1)
    ours = np.asarray(kvjax.decode(MODEL, logits, state, method, forced, keep_logits=True)[3])
    for more in ({}, {"host_budget": 70_000, "device_budget": 180_000, "ahead": False}):
        other = on_disk(tmp_path, **where, **more)
        found = load_context(tmp_path, MODEL, other)
        theirs = kvjax.decode(MODEL, logits, found.state, other, forced, keep_logits=True)[3]
        np.testing.assert_array_equal(ours, theirs)
        assert on_host(found.state[0].aux) == bool(where)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000001", "00000002", "lock", "manifest.json"]


def test_a_state_that_is_closed_and_a_folder_of_others_are_refused(tmp_path):
    method = on_disk(tmp_path / "a")
    _, logits, state = read(method)
    with pytest.raises(ValueError, match="stay in their folder"):
        save_context(tmp_path / "b", MODEL, method, state)
    with pytest.raises(ValueError, match="one process writes"):
        subprocess_lock(tmp_path / "a")
    read(method)
    with pytest.raises(ValueError, match="one that is closed"):
        kvjax.decode(MODEL, logits, state, method, np.full((2, 2), -1))
    with pytest.raises(ValueError, match="one that is closed"):
        save_context(tmp_path / "a", MODEL, method, state)
    (tmp_path / "c").write_text("a file")
    with pytest.raises(OSError, match="can be written to"):
        read(on_disk(tmp_path / "c"))


def subprocess_lock(folder):
    """What another process is told of a folder that this one uses."""
    code = f"from pathlib import Path; from kvjax import context_folder as c; c.lock(Path({str(folder)!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    raise ValueError(run.stderr[-300:])


def test_too_small_a_disk_is_told_before_the_prompt_is_read(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(reading, "_read", lambda *args, **kwargs: pytest.fail("the prompt was read"))
    with pytest.raises(OSError, match="fits its disk"):
        read(on_disk(tmp_path))


@pytest.mark.parametrize("after", [0, 3, 40])
def test_a_disk_that_gets_full_is_told_by_the_step_that_meets_it(tmp_path, monkeypatch, after):
    write, calls = os.pwrite, []

    def refuses(handle, data, place):
        calls.append(place)
        if place and len(calls) > after + 4:  # but for the first block of each file
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data, place)

    monkeypatch.setattr(blocks.os, "pwrite", refuses)
    with pytest.raises(OSError, match=r"No space.*\.(chunks|blocks)"):
        save_context(tmp_path, MODEL, (method := on_disk(tmp_path)), read(method)[2])


def test_a_read_that_is_cut_short_is_named(tmp_path, monkeypatch):
    method = on_disk(tmp_path, host_budget=40_000)
    preadv = os.preadv
    monkeypatch.setattr(
        blocks.os,
        "preadv",
        lambda h, bufs, at: min(preadv(h, bufs, at), 700) if at > 9000 else preadv(h, bufs, at),
    )
    with pytest.raises(DamagedBlock, match=r"tokens .* cut short"):
        read(method)


def test_a_slow_disk_changes_nothing_but_the_time(tmp_path, monkeypatch, plain):
    whole = blocks.BlockFile.read_run

    def slow(*args):
        time.sleep(0.002)
        return whole(*args)

    monkeypatch.setattr(blocks.BlockFile, "read_run", slow)
    kept, _, state = read(on_disk(tmp_path, host_budget=70_000))
    np.testing.assert_array_equal(kept, plain)
    assert sum(t.waited_s for t in disk.traffic(state)) > 0


@pytest.mark.parametrize("where", [{}, {"abstracts": "host", "root": None}])
def test_what_was_sealed_is_found_after_a_crash(tmp_path, where):
    method = on_disk(tmp_path / "a", topk=1.0, **where)  # so that steps read as prompts do
    _, logits, state = read(method)
    disk.Disk.of(state).sync()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    there = on_disk(tmp_path / "b", topk=1.0, **where)
    found = recover_context(tmp_path / "b", MODEL, there).state
    assert found[0].seen.tolist() == [104, 112]
    # with what was read of one row again, as if it had never stopped
    tokens = np.concatenate([IDS, np.random.default_rng(1).integers(0, 90, (2, 24))], axis=1)
    rest = kvjax.pad([tokens[0, 113:].tolist(), tokens[1, 112:].tolist()])
    again, found = kvjax.prefill(MODEL, rest, there, state=found, room=5)
    np.testing.assert_allclose(again, logits, atol=2e-4)
    forced = np.full((2, 4), 3)
    ours = kvjax.decode(MODEL, logits, state, method, forced, keep_logits=True)[3]
    theirs = kvjax.decode(MODEL, again, found, there, forced, keep_logits=True)[3]
    np.testing.assert_allclose(np.asarray(ours)[:, 1:], np.asarray(theirs)[:, 1:], atol=2e-4)
    with pytest.raises(FileNotFoundError, match="chunks on the disk"):
        recover_context(tmp_path / "none", MODEL, there)
    mixed = dataclasses.replace(on_disk(tmp_path / "d"), dense_layers=1)
    read(mixed)
    with pytest.raises(ValueError, match="read the tokens anew"):
        recover_context(tmp_path / "d", MODEL, mixed)


def test_tokens_that_others_have_followed_are_not_found(tmp_path):
    method = on_disk(tmp_path, topk=1.0)
    _, logits, state = read(method)
    save_context(tmp_path, MODEL, method, state)
    kvjax.decode(MODEL, logits, state, method, np.full((2, 24), 5))  # up to 129 and 138 tokens, not saved
    state = load_context(tmp_path, MODEL, method).state
    kvjax.decode(MODEL, logits, state, method, np.full((2, 10), 6))  # up to 115 and 124
    assert recover_context(tmp_path, MODEL, method).state[0].seen.tolist() == [112, 120]


def test_generation_lets_its_folder_go_and_so_does_the_user(tmp_path):
    method, before = on_disk(tmp_path), set(disk.Disk.by_folder)
    kvjax.generate(MODEL, [[3, 5, 7]], method, max_new_tokens=4)
    next(steps := kvjax.stream(MODEL, [[3, 5, 7]], method, max_new_tokens=40))
    steps.close()
    assert set(disk.Disk.by_folder) == before
    _, state = kvjax.prefill(MODEL, IDS, method, room=8)
    kvjax.close_context(state)
    assert set(disk.Disk.by_folder) == before
    with pytest.raises(ValueError, match="got one that is closed"):
        kvjax.close_context(state)
    kvjax.close_context(kvjax.prefill(MODEL, IDS, room=8)[1])  # nothing to close
