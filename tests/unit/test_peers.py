"""Tests the comparison with the peers, with children that only pretend."""

import json
import sys

import numpy as np
import pytest

from experiments import peers

ANSWERS = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"heard": line.strip()}), flush=True)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Returns a function that starts a child with the given program."""
    started = []

    def start(program: str) -> peers.Child:
        path = tmp_path / "child.py"
        path.write_text(program)
        monkeypatch.setattr(peers, "CHILD", path)
        started.append(peers.Child("torch", sys.executable, {"n_new": 3}, tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.close()


def run(prefill_s, decode_s, ids):
    return {
        "prefill_s": prefill_s,
        "prefill_core_s": 2 * prefill_s,
        "decode_s": decode_s,
        "decode_core_s": 1,
        "ids": ids,
    }


def test_a_child_gets_the_request_and_answers(child, tmp_path):
    ready = child(ANSWERS).ready()
    assert json.loads(ready["heard"]) == {"n_new": 3, "logits": str(tmp_path / "torch.npy")}


@pytest.mark.parametrize("program", ["import sys; sys.exit(1)", "print('no JSON')"])
def test_a_child_that_dies_is_named(child, program):
    started = child(program)
    with pytest.raises(RuntimeError, match="answers each request, got none from 'torch'"):
        started.run()


def test_medians_are_compared():
    runs = {
        "kvjax": [run(s, 1, [1]) for s in (1.0, 9.0, 2.0)],
        "torch": [run(s, 1, [1]) for s in (4.0, 3.0, 8.0)],
    }
    row = peers.compared(runs, "prefill")
    assert (row["time_us"], row["peer_us"], row["speedup"]) == (2e6, 4e6, 2.0)
    assert (row["core_us"], row["peer_core_us"]) == (4e6, 8e6)
    assert row["runs_us"] == [1e6, 9e6, 2e6]


def agree(tmp_path, difference, ids):
    children = {side: type("Fake", (), {"logits": tmp_path / f"{side}.npy"}) for side in peers.SIDES}
    for side, shift in zip(peers.SIDES, (0, difference), strict=True):
        np.save(children[side].logits, np.arange(5.0) + shift)
    runs = {side: [run(1, 1, row)] for side, row in zip(peers.SIDES, ids, strict=True)}
    return peers.agreement(children, runs)


def test_agreement_counts_leading_equal_tokens(tmp_path):
    assert agree(tmp_path, 1e-5, ([1, 2, 3, 4], [1, 2, 9, 4]))["tokens_agreeing"] == 2
    assert agree(tmp_path, 1e-5, ([1, 2], [1, 2]))["tokens_agreeing"] == 2


@pytest.mark.parametrize("difference", [1e-2, float("nan")])
def test_times_of_different_results_are_refused(tmp_path, difference):
    with pytest.raises(RuntimeError, match="both sides give the same logits"):
        agree(tmp_path, difference, ([1], [1]))


def test_a_busy_machine_is_refused_unless_allowed(monkeypatch):
    monkeypatch.setattr(peers.os, "getloadavg", lambda: (3.0, 3.0, 3.0), raising=False)
    with pytest.raises(RuntimeError, match="have the cores to themselves"):
        peers.load_average(busy=False)
    assert peers.load_average(busy=True) == 3.0
