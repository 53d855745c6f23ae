"""Runs LeoAM's experiments on a tiny random model."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import codebooks as random_codebooks

import kvjax
from experiments import leoam, leoam_chunks, leoam_recall, results, scoring
from experiments.leoam_chunks import WAYS, Way, _tree
from kvjax import blocks, text
from kvjax.calibrate import codebooks
from kvjax.chunk_tree import Shape
from kvjax.methods import layers
from kvjax.model import fingerprint
from kvjax.rope import rotate
from tests.tiny_models import byte_tokenizer, tiny

SIZES = [
    "--docs", "1", "--context", "512", "--queries", "2", "--shares", "0.3", "--roots", "32", "128",
    "--window", "16", "--n-sinks", "4",
]  # fmt: skip
# Each is compiled.
FEW_WAYS = (
    "leaf 8",
    "leaf 16",
    "2 pairs",
    "1 point",
    "1 middle",
    "leaf 8, 8 bits",
    "leaf 8, 1 middle, 4 bits",
)
QUALITY = [
    "--docs", "1", "--context", "200", "--rest", "16", "--shares", "0.4", "--methods",
    "leoam:leaf=8,window=16,n_sinks=4", "quest:dense_layers=0", "--keys", "1", "--novel-keys", "0",
    "--key-context", "336",
]  # fmt: skip


@pytest.fixture
def model(monkeypatch):
    """A model whose first layer has a window."""
    found = tiny(byte_tokenizer(), context=512, windows=(24, None, None))
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: found)
    return found


def test_every_way_to_rank_is_measured_once(tmp_path, monkeypatch, model):
    arguments = ["recall", *SIZES, "--out", str(tmp_path)]
    ways = {way: WAYS[way] for way in FEW_WAYS}
    monkeypatch.setattr(leoam_chunks, "WAYS", ways)
    assert leoam.main(arguments) == 0
    (path,) = (tmp_path / "leoam_recall").glob("*.json")
    data = results.load(path)
    assert [(row["layer"], row["share"]) for row in data["rows"]] == [(1, 0.3), (2, 0.3)]  # 0 has a window
    for row in data["rows"]:
        assert row["ways"].keys() == {*ways, "true leaf 1", "true leaf 16"}
        best = row["ways"]["true leaf 1"]
        assert best["useless"] == 0
        for way, values in row["ways"].items():
            assert 0 < values["far"] <= best["far"] + 1e-6, way
            assert values["far"] < values["mass"] <= 1.00001, way
            assert 0.2 < values["tokens"] < 0.31, way
        assert row["ways"]["leaf 16"]["far"] <= row["ways"]["true leaf 16"]["far"]
        assert row["ways"]["2 pairs"]["abstracts"] == row["ways"]["leaf 8"]["abstracts"] == 0.125
        assert row["ways"]["leaf 8, 8 bits"]["abstracts"] == 0.125 * (8 * 8 + 32) / (16 * 8)
        for root, values in row["descents"].items():
            assert (
                0 < values["of_leaves"] < 1 + 16 / int(root) + 1 / 28
            )  # a root more, of which there is a part
            assert values["of_tokens"] == pytest.approx(values["of_leaves"] / 16)
        assert all(0 <= x <= 1 for x in row["accepted"].values())
        for values in row["predictions"].values():
            assert 0 < values["hit"] <= 1
    assert all(math.isfinite(x) for x in data["claims"].values())
    assert data["claims"]["smollm2.leaf_16.mass_recall@0.3"] == np.mean(
        [row["ways"]["leaf 16"]["mass"] for row in data["rows"]]
    )
    monkeypatch.setattr(leoam_recall, "asked", pytest.fail)
    assert leoam.main(arguments) == 0
    assert results.load(path) == data


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_half_a_step_off_at_most(bits):
    rng = np.random.default_rng(0)
    keys, at = jnp.asarray(rng.normal(size=(2, 32, 16)), jnp.float32), jnp.asarray([19, 31])
    shape = Shape(8, None)
    exact, coded = (_tree(keys, at, Way(shape, bits=n)) for n in (None, bits))
    for x, y in ((exact.low, coded.low), (exact.high, coded.high)):
        x, y = np.asarray(x).reshape(-1, 16), np.asarray(y).reshape(-1, 16)
        there = np.isfinite(x).all(1)
        assert there.sum() == 14  # the first query sees three leaves of a head's four
        np.testing.assert_array_equal(x[~there], y[~there])
        error = np.abs(x[there] - y[there]).max(1)
        step = np.ptp(x[there], axis=1) / (2**bits - 1)
        assert (error <= 0.5 * step + 0.01 * np.abs(x[there]).max(1)).all()  # scales are bfloat16
        assert error.min() > 0


def test_middles_are_those_of_boxes():
    keys = jnp.asarray([[[0.0], [1.0], [5.0], [9.0]]])
    tree = _tree(keys, jnp.asarray([3]), Way(Shape(2, None, 1, "middle")))
    assert tree.low[0, :, 0].tolist() == [0.5, 7.0]
    assert tree.high is None


def test_a_query_is_foreseen_from_the_layer_s_own_input(model):
    """With the input of the layer itself, what is foreseen is the query."""
    settings = leoam_recall.Recall(docs=1, context=512, queries=2)
    tried, layer = leoam_recall._Tried(settings, model), layers(model.config)[2]
    params = model.params | {"layer_1": model.params["layer_2"]}
    again = leoam_recall._Tried(settings, dataclasses.replace(model, params=params))
    again.__dict__["inputs"] = [[x[2] for x in tried.inputs] * 3]
    q = tried.records[0][2].q[tried.at]
    q = rotate(q, jnp.broadcast_to(jnp.asarray(tried.at)[:, None, None], q.shape[:3]), layer.rope)
    np.testing.assert_allclose(again.foreseen(0, 2), q, atol=1e-4)
    assert tried.foreseen(0, 0) is None


@pytest.mark.parametrize("more", [["--context", "500"], ["--queries", "3"], ["--queries", "0"]])
def test_places_that_are_no_ends_of_chunks_are_refused(more, tmp_path, capsys):
    assert leoam.main(["recall", *SIZES, *more, "--out", str(tmp_path)]) == 2
    assert "a document's last quarter is a multiple of 64 tokens" in " ".join(capsys.readouterr().err.split())


def test_quality_is_measured_once_at_equal_bytes(tmp_path, monkeypatch, model):
    books = dataclasses.replace(random_codebooks(model), flat=(True, False, False), model=fingerprint(model))
    codebooks.save(books, tmp_path / "books")
    learned = tmp_path / "learned.txt"
    learned.write_text(text.read_text(text.PROSE)[200_000:230_000], encoding="utf-8")
    more = ["--learned", str(learned), "--calibration", str(tmp_path / "books"), "--out", str(tmp_path)]
    arguments = ["quality", *QUALITY, *more]
    assert leoam.main(arguments) == 0
    (path,) = (tmp_path / "leoam_quality").glob("*.json")
    data = results.load(path)
    names = ["full", "leoam:leaf=8,window=16,n_sinks=4", "quest:dense_layers=0", "leoam, fitted", "a2ats"]
    assert [row["name"] for row in data["rows"]] == names
    assert path.with_suffix(".png").stat().st_size > 10_000
    full, ours, quest, *_ = data["rows"]
    assert full["kl"] < 1e-6 < ours["kl"]
    for row in (ours, quest):
        assert abs(row["read"] - 0.4) < 0.06, row["name"]
    assert data["claims"][f"smollm2.{names[1]}.kl@0.4"] == ours["kl"]
    for name in ("Prose", "Answers"):
        monkeypatch.setattr(scoring, name, pytest.fail)
    assert leoam.main(arguments) == 0
    assert results.load(path) == data


def test_texts_that_chunks_are_fitted_on_are_not_asked_about(tmp_path, model, capsys):
    assert leoam.main(["quality", *QUALITY, "--learned", text.PROSE, "--out", str(tmp_path)]) == 2
    assert "texts that they were not made from" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["full", "a2ats:far=64", "leoam:topk=5", "kivi"])
def test_methods_that_are_not_given_bytes_are_refused(name, tmp_path, model, capsys):
    assert leoam.main(["quality", *QUALITY, "--methods", name, "--out", str(tmp_path)]) == 2
    assert "a method" in " ".join(capsys.readouterr().err.split())


def test_smaller_chunks_bring_fewer_bytes(tmp_path, model, capsys):
    arguments = [
        "reads", "--context", "320", "--rest", "96", "--topk", "0.2", "--methods",
        "leoam:leaf=8,window=16,n_sinks=4", "leoam:leaf=8,window=16,n_sinks=4,known_by=mean",
        "--chunks", "4", "8", "32", "--device", "1", "--host", "0", "0.3", "--out", str(tmp_path),
    ]  # fmt: skip
    assert leoam.main(arguments) == 0
    (path,) = (tmp_path / "leoam_reads").glob("*.json")
    data = results.load(path)
    assert len(data["claims"]) == 2 * len(data["rows"])
    rows = {(r["chunk"], r["host"]): r for r in data["rows"] if r["name"].endswith("sinks=4")}
    assert rows.keys() == {(8, 0), (8, 0.3), (32, 0), (32, 0.3)}  # a chunk has whole leaves
    for (chunk, host), row in rows.items():
        assert 0 < row["disk_chunks"] <= row["asked_chunks"] <= row["crossed"] < row["chosen"]
        assert row["disk_bytes"] == row["disk_chunks"] * blocks.stride_of(chunk * 512)
        assert host or row["disk_chunks"] == row["asked_chunks"]
    assert all(rows[chunk, 0.3]["disk_bytes"] < rows[chunk, 0]["disk_bytes"] for chunk in (8, 32))
    assert all(rows[8, host]["disk_bytes"] < rows[32, host]["disk_bytes"] for host in (0, 0.3))
    assert leoam.main([*arguments[:4], "64", *arguments[5:]]) == 2
    assert "steps after the first 64 are counted" in capsys.readouterr().err
