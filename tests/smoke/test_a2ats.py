"""Runs A²ATS's experiments on a tiny random model."""

import math

import pytest

import kvjax
from experiments import a2ats, a2ats_recall, results
from kvjax import text
from tests.tiny_models import byte_tokenizer, tiny

SIZES = [
    "--docs", "1", "--context", "128", "--queries", "3", "--ratios", "0.05", "0.2", "--centroids", "32",
    "--tokens", "1024", "--iterations", "9", "--steps", "20", "--window", "16", "--n-sinks", "2",
    "--far", "64",
]  # fmt: skip


@pytest.fixture
def learned(tmp_path):
    """A text that is not the one asked about."""
    path = tmp_path / "learned.txt"
    path.write_text(text.read_text(text.PROSE)[200_000:260_000], encoding="utf-8")
    return str(path)


def test_every_way_to_rank_is_measured_once(tmp_path, monkeypatch, learned):
    model = tiny(byte_tokenizer(), context=512, windows=(24, None))
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)
    arguments = ["recall", *SIZES, "--learned", learned, "--out", str(tmp_path)]
    assert a2ats.main(arguments) == 0
    (path,) = (tmp_path / "a2ats_recall").glob("*.json")
    rows = {(row["name"], row["ratio"]): row for row in results.load(path)["rows"]}
    names = {"exact", "far", "rotated", "plain", "aware", "refined", "quest"}
    assert rows.keys() == {(name, ratio) for name in names for ratio in (0.05, 0.2)}
    for (name, ratio), row in rows.items():
        assert all(math.isfinite(row[k]) and 0 < row[k] <= 1.00001 for k in ("mass", "mass_union", "read"))
        assert len(row["mass_layers"]) == 1  # the other layer has a window
        assert row["recall"] <= rows["exact", ratio]["recall"] == 1, name
        assert row["mass"] <= rows["exact", ratio]["mass"] + 1e-6 or name == "quest"
    assert rows["exact", 0.05]["mass"] < rows["exact", 0.2]["mass"]
    assert abs(rows["quest", 0.2]["read"] - rows["aware", 0.2]["read"]) < 16 / 96

    def measures(*args):
        raise AssertionError("a stored row is measured again")

    monkeypatch.setattr(a2ats_recall, "_figures", measures)
    assert a2ats.main(arguments) == 0


@pytest.mark.parametrize("more", [[], ["--learned", text.PROSE]])
def test_texts_that_codebooks_were_made_from_are_not_asked_about(more, tmp_path, capsys):
    assert a2ats.main(["recall", *more, "--out", str(tmp_path)]) == 2
    assert "texts that they were not made from" in capsys.readouterr().err.replace("\n", " ")
