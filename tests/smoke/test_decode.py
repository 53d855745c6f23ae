"""Compiles and times the whole decode step of a tiny model, and shows that a bad step is told."""

from pathlib import Path

import pytest

from experiments import decode, decode_model, results

TINY = ["--shape", "tiny", "--cases", "1x256"]
GOOD = {
    "fits": True,
    "alias_bytes": 2**30,
    "state_bytes": 2**30,
    "temp_bytes": 2**25,
    "cache_copies": 0,
    "collectives": {"all-reduce": {"count": 65, "largest_bytes": 8192}},
}


def stored(folder: Path, experiment: str) -> dict:
    (path,) = (folder / experiment).glob("*.json")
    return results.load(path)


@pytest.mark.parametrize("device", ["v5e", "v6e"])
def test_the_step_compiles_for_eight_chips(device, tmp_path, capsys):
    command = ["aot", *TINY, "--devices", device, "--out", str(tmp_path)]
    assert decode.main(command) == 0
    assert "5 all-reduce" in capsys.readouterr().out  # the embedding and two a layer
    data = stored(tmp_path, "decode_aot")
    (row,) = data["rows"]
    assert row["alias_bytes"] >= row["state_bytes"] > 2 * 2 * 256 * 128 * 2
    assert row["impl"] == {"decode_attention": "tpu", "append_rows": "reference"}
    assert data["claims"] == {"full.peak_bytes_b1_256": row["peak_bytes"]}
    assert data["device"].startswith("8 x TPU v")
    before = data["date"]
    assert decode.main(command) == 0  # nothing is left to compile
    assert stored(tmp_path, "decode_aot")["date"] == before


def test_steps_are_timed(tmp_path, capsys):
    sizes = ["--layers", "1", "--steps", "2", "--samples", "3", "--copy-mib", "1"]
    command = ["speed", *TINY, *sizes, "--out", str(tmp_path)]
    assert decode.main(command) == 0
    assert "us a step" in capsys.readouterr().out
    data = stored(tmp_path, "decode")
    (row,) = data["rows"]
    assert row["time_us"] > row["floor_us"] > 0
    assert row["fraction"] == data["claims"]["full.fraction_b1_256"] == row["floor_us"] / row["time_us"]
    assert len(row["samples_us"]) == 3
    config = decode_model.config_of("tiny", 1)
    weights = 2 * (config.n_params() - config.vocab_size * config.width)
    scales = 2 * config.width * (2 * config.n_layers + 1)  # float32: two bytes more than counted
    assert row["bytes"] == weights + scales + 2 * 256 * 8 * 128 * 2


BAD = [
    ({"alias_bytes": 7}, "bytes of cache are updated in place, got 7"),
    ({"temp_bytes": 2**30}, "temporaries are small beside the cache, got 1073741824 bytes"),
    ({"cache_copies": 3}, "keys and values are not copied, got 3 copies"),
    (
        {"collectives": {"all-gather": {"count": 1, "largest_bytes": 2**27}}},
        "collectives carry activations only, got all-gather of 134217728 bytes",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_step_that_is_not_as_it_should_be_is_told(change, message):
    config = decode_model.config_of("llama-3.1-8b")
    assert decode.problems(GOOD, config, (8, 32768)) == []
    (problem,) = decode.problems(GOOD | change, config, (8, 32768))
    assert problem.endswith(message)


def test_a_step_that_does_not_fit_is_no_fault():
    assert (
        decode.problems({"fits": False, "error": "too large"}, decode_model.config_of("tiny"), (8, 1)) == []
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sped"], "a command is one of aot, speed, got 'sped'"),
        ([], "a command is one of aot, speed, got ''"),
        (["speed", "--shape", "9b"], "a shape is one of llama-3.1-8b, longchat-7b, qwen2.5-1.5b, tiny"),
        (["speed", "--shape", "tiny", "--layers", "0"], "a model has at least 1 layer, got n_layers=0"),
        (["aot", "--cases", "8-32768"], "a case is batch x slots, such as 8x32768, got '8-32768'"),
    ],
)
def test_a_wrong_option_is_told_in_words(arguments, message, tmp_path, capsys):
    assert decode.main([*arguments, *(["--out", str(tmp_path)] if arguments else [])]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_8b_shape_has_8_billion_parameters():
    assert decode_model.config_of("llama-3.1-8b").n_params() == 8_030_261_248
    assert decode_model.config_of("llama-3.1-8b", 2).n_layers == 2


def test_a_child_that_fails_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "_CHILD", tmp_path / "none.py")
    assert decode.main(["aot", *TINY, "--devices", "v5e", "--out", str(tmp_path)]) == 1
    assert "the compiler takes the decode step for v5e, got exit code 2" in capsys.readouterr().err.replace(
        "\n", " "
    )
