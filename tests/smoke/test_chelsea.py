"""Runs Chelsea's experiments on a tiny random model."""

import math

import pytest

import kvjax
from experiments import chelsea, chelsea_long, results, scoring
from kvjax import replay
from tests.tiny_models import byte_tokenizer, tiny

SIZES = {
    "sweep": [
        "--docs", "1", "--context", "320", "--rest", "16", "--keeps", "0.5", "--settings", "", "chunk=32",
    ],
    "quality": [
        "--docs", "2", "--calibration", "1", "--context", "340", "--rest", "16", "--keeps", "0.5",
        "--methods", "knorm", "--refine", "1", "--refined", "h2o", "--keys", "2", "--novel-keys", "1",
        "--key-context", "336",
    ],
    "long": [
        "--docs", "1", "--prompt", "160", "--new", "48", "--budget", "160", "--methods", "streaming_llm",
    ],
}  # fmt: skip
NAMES = {
    "sweep": ["chelsea", "chelsea"],
    "quality": ["full", "knorm", "chelsea", "chelsea, calibrated", "h2o, refined", "chelsea, refined"],
    "long": ["chelsea", "streaming_llm"],
}


@pytest.mark.parametrize("command", SIZES)
def test_every_row_is_measured_once_and_drawn(command, tmp_path, monkeypatch):
    model = tiny(byte_tokenizer(), context=512, windows=(None,))
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)
    arguments = [command, *SIZES[command], "--out", str(tmp_path)]
    assert chelsea.main(arguments) == 0
    (path,) = (tmp_path / f"chelsea_{command}").glob("*.json")
    data = results.load(path)
    assert [row["name"] for row in data["rows"]] == NAMES[command]
    assert all(math.isfinite(row["kl"]) and row["kl"] >= 0 for row in data["rows"])
    assert path.with_suffix(".png").stat().st_size > 10_000
    if command == "quality":
        full, *others = data["rows"]
        assert full["kl"] < 1e-6 < min(row["kl"] for row in others)
        assert all(row["bytes_held"] < 0.52 * full["bytes_held"] for row in others)
        assert data["claims"]["smollm2.knorm.kl@0.5"] == others[0]["kl"]

    def measures(*args):
        raise AssertionError("a stored row is measured again")

    for name in ("Prose", "Answers"):
        monkeypatch.setattr(scoring, name, measures)
    monkeypatch.setattr(chelsea_long, "_decoded", measures)
    assert chelsea.main(arguments) == 0


def test_a_sweep_lets_go_of_the_programs_of_a_row(tmp_path, monkeypatch):
    """Dozens of settings would run out of a process's memory mappings on a CPU."""
    model = tiny(byte_tokenizer(), context=512, windows=(None,))
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)
    counts = []
    for settings in ("chunk=32",), ("chunk=32", "chunk=64", "stride=3"):
        arguments = ["sweep", *SIZES["sweep"][:-2], *settings, "--calibrated", "--out"]
        assert chelsea.main([*arguments, str(tmp_path / str(len(settings)))]) == 0
        counts.append(replay._finish_layer._cache_size())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "a command is one of"), (["sweep", "--settings", "chunck=4"], "did you mean 'chunk'")],
)
def test_a_bad_option_is_explained(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: tiny(byte_tokenizer()))
    assert chelsea.main(arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
