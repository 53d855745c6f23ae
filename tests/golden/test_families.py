"""Compares every family with transformers on the tiny models that make_families.py wrote."""

from pathlib import Path

import numpy as np
import pytest

import kvjax

DATA = Path(__file__).parent / "data" / "families"
FOLDERS = sorted(p for p in DATA.iterdir() if p.is_dir())
TOLERANCE = 1e-4  # absolute, on logits of standard deviation 1.2 to 1.6; float32 against float64 is 2e-5


@pytest.fixture(params=FOLDERS, ids=lambda p: p.name)
def golden(request):
    """The model of one folder in float32, its token ids [B T] and the peer's logits [B T V]."""
    with np.load(request.param / "logits.npz") as file:
        return (
            kvjax.load(str(request.param), dtype="float32"),
            file["ids"],
            file["logits"],
        )


def test_logits_equal_transformers(golden):
    model, ids, expected = golden
    logits = np.asarray(model.logits(ids))
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < TOLERANCE


def test_goldens_tell_rows_and_positions_apart(golden):
    """A golden whose logits hardly move would pass a wrong decoder."""
    _, _, expected = golden
    assert np.abs(expected[0] - expected[1]).max() > 1
    assert np.abs(expected[:, 1:] - expected[:, :-1]).max(-1).min() > 0.1


@pytest.mark.parametrize("name", ["gemma3", "llama_yarn", "mistral", "qwen2_window"])
def test_chunks_and_a_step_equal_transformers(name):
    """Windows and rotary positions hold over the borders of chunks and in decoding."""
    with np.load(DATA / name / "logits.npz") as file:
        ids, expected = file["ids"], file["logits"]
    model = kvjax.load(DATA / name, dtype="float32")
    before, state = kvjax.prefill(model, ids[:, :-1], room=1, chunk=16)
    after, _ = kvjax.decode_step(model, ids[:, -1], state)
    assert np.abs(np.asarray(before) - expected[:, -2]).max() < TOLERANCE
    assert np.abs(np.asarray(after) - expected[:, -1]).max() < TOLERANCE
