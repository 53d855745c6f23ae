"""Runs the whole comparison on a tiny random model."""

import errno
import json
import os

import pytest

import kvjax
from experiments import compare, results, trial
from tests.tiny_models import byte_tokenizer, tiny

SIZES = ["--context", "336", "--continuation", "48", "--docs", "1", "--budgets", "1", "0.25"]
METHODS = ["--methods", "snapkv:window=8", "kivi8", "mine"]
MINE = '''
"""Keeps the newest tokens."""
from dataclasses import dataclass
from typing import ClassVar
from kvjax import eviction
from kvjax.method import CacheMethod

@dataclass(frozen=True)
class Mine(CacheMethod):
    """Keeps the newest tokens."""
    budget: int
    evicts: ClassVar[bool] = True

    def compress(self, kv, q, pos):
        return eviction.by_score(kv, kv.pos.astype("float32"), self.budgets(kv.layer))[0]
'''
ROWS = [
    ("full", 1.0, "unseen"),
    ("snapkv:window=8", 0.25, "unseen"),
    ("snapkv:window=8", 0.25, "seen"),
    ("kivi8", 1.0, "unseen"),
    ("mine", 0.25, "unseen"),
    ("mine", 0.25, "seen"),
]


@pytest.fixture(scope="module")
def model():
    return tiny(byte_tokenizer(), context=512)


@pytest.fixture
def command(model, tmp_path, monkeypatch):
    """The arguments of a run with a plugin; its model is the tiny one."""
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)
    (tmp_path / "mine.py").write_text(MINE)
    return [*SIZES, *METHODS, "--plugin", str(tmp_path / "mine.py"), "--out", str(tmp_path)]


def stored(folder) -> dict:
    (path,) = (folder / "compare").glob("*.json")
    return results.load(path)


def named(data: dict) -> list:
    return [(row["name"], row["ratio"], row["question"]) for row in data["rows"]]


def test_a_run_is_interrupted_resumed_and_then_complete(command, tmp_path, monkeypatch, capsys):
    run, done = trial.run, []

    def at_most(n):
        def counted(pre, t, *rest):
            if len(done) == n:
                raise KeyboardInterrupt
            done.append((t.name, t.ratio, t.question))
            return run(pre, t, *rest)

        monkeypatch.setattr(trial, "run", counted)
        done.clear()

    at_most(3)
    assert compare.main(command) == 130
    said = capsys.readouterr().err.replace("\n", " ")
    assert "3 of 6 rows are in" in said
    assert "The same command goes on from there." in said
    assert named(stored(tmp_path)) == ROWS[:3]

    at_most(99)
    assert compare.main(command) == 0
    assert done == [ROWS[0], *ROWS[3:]]  # full is run again: the others are compared with it
    shown = capsys.readouterr().out
    assert "mine" in shown
    assert ".png" in shown

    data = stored(tmp_path)
    assert sorted(named(data)) == sorted(ROWS)
    check_figures({(row["name"], row["question"]): row for row in data["rows"]}, data["claims"])
    assert (tmp_path / "compare").joinpath(next((tmp_path / "compare").glob("*.png"))).stat().st_size > 10_000

    at_most(0)
    assert compare.main(command) == 0  # nothing is left to measure
    assert compare.main([*command, "--seed", "1"]) == 130  # another seed is another run
    assert len(list((tmp_path / "compare").glob("*.json"))) == 1


def check_figures(rows: dict, claims: dict):
    full, ours = rows["full", "unseen"], rows["snapkv:window=8", "unseen"]
    assert (full["kl"], full["held"], full["read"]) == (0, 1, 1)
    assert full["top1"] == pytest.approx(1)
    assert ours["budget"] == 96 == round(0.25 * (336 + 48))
    assert 0.25 <= ours["held"] < 0.27
    assert ours["kl"] > 10 * rows["kivi8", "unseen"]["kl"] > 0
    assert 0 < ours["top1"] < 1
    assert rows["snapkv:window=8", "seen"]["perplexity"] is None
    assert rows["snapkv:window=8", "seen"]["bytes_held"] == ours["bytes_held"]
    assert claims["full.perplexity"] == full["perplexity"] > 1
    assert claims["mine.kl@0.25"] == rows["mine", "unseen"]["kl"]
    assert claims["mine.passkey_seen@0.25"] == 0
    for row in rows.values():
        assert len(row["answers"]) == 5
        assert row["decode_step_s"] > 0
        assert row["prefill_s"] > 0


def test_a_full_disk_is_told_and_what_is_stored_stays(command, tmp_path, monkeypatch, capsys):
    assert compare.main([*command, "--methods", "full"]) == 0
    before = stored(tmp_path)
    replace, n = os.fsync, []

    def full_disk(fd):
        n.append(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full_disk)
    assert compare.main([*command, "--methods", "kivi8"]) == 1
    monkeypatch.setattr(results.os, "fsync", replace)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert n
    assert stored(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "snapvk"], "did you mean 'snapkv'?"),
        (["--budgets", "8"], "a budget is a share in (0, 1], got 8.0"),
        (["--context", "5000"], "context and continuation fit the model's context of 512 tokens, got 5048"),
        (["--context", "200"], "a pass-key text has room for filler"),
        (["--continuation", "5"], "a continuation goes beyond"),
        (["--docs", "4000"], "a text holds all excerpts"),
        (["--methods", "snapkv:window=200"], "a budget holds more than its window"),
        (["--model", "x", "--text", "no.txt"], "No such file"),
        (["--plugin", "no.py"], "a plugin is a .py file"),
    ],
)
def test_a_wrong_option_is_told_in_words(command, tmp_path, capsys, arguments, message):
    assert compare.main([*command, *arguments]) in (1, 2)
    said = capsys.readouterr().err.replace("\n", " ")
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "compare").exists()


def test_an_unknown_model_names_the_nearest(tmp_path, capsys):
    assert compare.main(["--model", "smollm2-136m", "--out", str(tmp_path)]) == 2
    assert "'smollm2-135m'" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: tiny())
    assert compare.main(["--out", str(tmp_path)]) == 2
    assert "a comparison needs a tokenizer" in capsys.readouterr().err


def test_a_result_says_how_it_came_about(command, tmp_path):
    assert compare.main([*command, "--methods", "full"]) == 0
    data = json.loads(next((tmp_path / "compare").glob("*.json")).read_text())
    assert data["command"].startswith("python -m experiments.compare --context 336")
    assert {"jax", "source"} <= data["versions"].keys()
    assert data["seed"] == 0
