"""Runs the experiments of activation sparsity on tiny random models."""

import math

import pytest

import kvjax
from experiments import chess, chess_quality, results
from kvjax import text
from tests.tiny_models import byte_tokenizer, tiny

QUALITY = [
    "--docs", "2", "--context", "96", "--tokens", "5120", "--length", "256", "--sparsities", "0.5",
    "--workers", "2",
]  # fmt: skip
METHODS = ("cats", "chess", "teal", "chess:plus=True")


@pytest.fixture
def learned(tmp_path):
    """A text that is not the one scored."""
    path = tmp_path / "learned.txt"
    path.write_text(text.read_text(text.PROSE)[200_000:260_000], encoding="utf-8")
    return str(path)


@pytest.fixture
def small(monkeypatch):
    model = tiny(byte_tokenizer(), context=640, windows=(None,))
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)


def quality(folder, learned, *more):
    assert chess.main(["quality", *QUALITY, "--learned", learned, "--out", str(folder), *more]) == 0
    (path,) = (folder / "chess_quality").glob("*.json")
    return path


def test_methods_are_scored_once_closed_and_refined(tmp_path, monkeypatch, small, learned):
    path = quality(tmp_path, learned, "--refine", "8")
    data = results.load(path)
    assert [(r["name"], r["form"]) for r in data["rows"]] == [
        ("dense", "closed"),
        *((name, form) for name in METHODS for form in ("closed", "refined")),
    ]
    assert path.with_suffix(".png").exists()
    for row in data["rows"][1:]:
        assert row["kl"] > 0
        assert abs(row["sparsity"] - 0.5) < 0.06, row["name"]
        assert row["off"] < 0.2 or row["form"] == "refined"
        assert 0 < row["ffn_error"] < 1 or row["name"] == "teal"
        assert row["unions"]["1"] <= row["unions"]["2"] <= row["unions"]["8"]
        assert row["rates"] == sorted(row["rates"])
        assert math.isclose(data["claims"][f"smollm2.{row['name']}.{row['form']}.kl@0.5"], row["kl"])

    def measures(*args):
        raise AssertionError("a stored row is measured again")

    monkeypatch.setattr(chess_quality.activations, "run", measures)
    quality(tmp_path, learned, "--refine", "8")


@pytest.mark.parametrize("command", ["quality", "together"])
def test_text_that_thresholds_are_made_from_is_not_scored(tmp_path, small, command, capsys):
    assert chess.main([command, "--out", str(tmp_path)]) == 2
    assert chess.main([command, "--learned", text.PROSE, "--out", str(tmp_path)]) == 2
    assert "not made from" in capsys.readouterr().err


def test_pairs_are_scored(tmp_path, small, learned):
    arguments = ["--docs", "2", "--context", "200", "--rest", "32", "--tokens", "5000", "--keep", "0.6"]
    caches = ["--caches", "chelsea:budget={budget},chunk=16,n_recent=16", "kivi4"]
    out = ["--learned", learned, "--out", str(tmp_path)]
    assert chess.main(["together", *arguments, *caches, *out]) == 0
    (path,) = (tmp_path / "chess_together").glob("*.json")
    rows = results.load(path)["rows"]
    assert len(rows) == 9
    kl = {(r["name"], r["cache"].partition(":")[0]): r["kl"] for r in rows}
    assert kl["dense", "full"] == 0
    assert min(kl["chess", "full"], kl["dense", "chelsea"], kl["dense", "kivi4"]) > 0
    assert kl["chess", "chelsea"] not in (kl["chess", "full"], kl["dense", "chelsea"])  # both act


def test_steps_are_timed_with_a_stored_pattern(tmp_path, small, learned, capsys):
    methods = ["--methods", "chess:plus=True"]
    pattern = str(quality(tmp_path, learned, *methods))
    arguments = [
        "--cases", "tiny:1x64", "tiny:2x64", "--together", "tiny:1x128", "--sparsities", "0.5",
        "--caches", "chelsea:budget=96,chunk=16,n_recent=16", "--steps", "2", "--samples", "2",
        "--copy-mib", "4", *methods,
    ]  # fmt: skip
    assert chess.main(["speed", "--pattern", pattern, *arguments, "--out", str(tmp_path)]) == 0
    (path,) = (tmp_path / "chess_speed").glob("*.json")
    data = results.load(path)
    assert len(data["rows"]) == 4 + 2 + 4
    for row in data["rows"]:
        assert row["step_us"] > 0
        for name, share in row["zeros"].items():
            wanted = row["sparsity"] ** row["batch"]
            assert abs(share - wanted) < 0.15, (row["name"], name)  # rates that differ by channel share more
        if row["name"] == "dense" and row.get("weight_bits", 16) == 16 and row.get("cache", "full") == "full":
            assert row["speedup"] == row["bytes_allow"] == 1
        elif row["part"] == "sparsity":
            assert row["bytes_allow"] > 1
    assert "chess.decode_speedup_50" in data["claims"]
    assert (
        chess.main(["speed", "--pattern", pattern, *arguments, "--parts", "here", "--out", str(tmp_path)])
        == 0
    )
    here = [row for row in results.load(path)["rows"] if row["part"] == "here"]
    assert [row["sparsity"] for row in here] == [0, 0.5]
    assert all(row["speedup"] > 0 for row in here)
    assert chess.main(["speed", "--pattern", pattern, *arguments, "--sparsities", "0.6"]) == 2
    assert "a pattern has the methods" in capsys.readouterr().err
    assert chess.main(["speed", "--pattern", pattern, *arguments, "--parts", "other"]) == 2


def test_questions_of_files_are_asked(tmp_path, small, learned):
    lines = ['{"context": "a b", "choices": [" c", " d"], "answer": %d}' % (i % 2) for i in range(6)]  # noqa: UP031
    (tmp_path / "letters.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--files", str(tmp_path / "letters.jsonl"), "--tokens", "4096", "--length", "256"]
    out = ["--learned", learned, "--out", str(tmp_path), "--methods", "chess", "cats"]
    assert chess.main(["choices", *arguments, *out]) == 0
    (path,) = (tmp_path / "chess_choices").glob("*.json")
    data = results.load(path)
    assert [r["name"] for r in data["rows"]] == ["dense", "chess", "cats"]
    assert all(r["acc"] == 0.5 and r["questions"] == 6 for r in data["rows"])
    assert data["claims"]["smollm2.chess.letters.acc_norm@0.5"] == 0.5
