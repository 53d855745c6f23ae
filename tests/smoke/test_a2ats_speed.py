"""Times A²ATS with rows on the host on a tiny random model: every row is there once, its bytes are right."""

import dataclasses
import math

import numpy as np
import pytest

from experiments import a2ats_speed, a2ats_split, decode_model, results
from experiments.a2ats_speed import Speed, speed
from experiments.a2ats_steps import timed
from experiments.a2ats_synthetic import locality
from experiments.cases import case_of

TINY = Speed(
    parts=("throughput", "small", "split", "context", "prefill"), cases=("tiny/1:1x512",),
    small="tiny/1:1x1024", context="tiny/1:1x1024", prompt="tiny/1:1x512", topk=0.05, hot=0.5,
    host_gib=2 * 8 * 128 * 512 * 2 * 2 / 2**30, steps=4, samples=1, chunk=128, copy_mib=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    settings = dataclasses.replace(TINY, out=tmp_path_factory.mktemp("speed"))
    assert speed(settings) == 0
    (path,) = (settings.out / "a2ats_speed").glob("*.json")
    return settings, results.load(path)


def test_every_part_has_its_rows_and_claims(measured):
    _, data = measured
    names = [(row["part"], row["name"]) for row in data["rows"]]
    assert names == [
        ("decode", "full"), ("decode", "host, 16 bits"), ("decode", "host, 8 bits"), ("decode", "full"),
        ("decode", "host, 16 bits"), ("split", "host"), ("prefill", "host"),
    ]  # fmt: skip
    assert data["claims"].keys() == {
        f"a2ats.{name}"
        for name in (
            "throughput_speedup", "throughput_speedup_0k_16bit", "throughput_speedup_0k_8bit",
            "step_speedup_tiny_l1_b1_1k", "select_share_of_step", "max_context_tokens", "max_context_step_us",
        )
    }  # fmt: skip
    assert all(math.isfinite(value) for value in data["claims"].values())
    whole, split = data["rows"][1], data["rows"][5]
    assert abs(split["hit_rate"] - whole["hit_rate"]) < 0.05
    assert data["claims"]["a2ats.max_context_tokens"] == 1024


def test_a_step_is_compared_with_its_bytes(measured):
    full, host, codes = measured[1]["rows"][:3]
    config = decode_model.config_of("tiny", 1)
    weights = (
        2 * (config.n_params() - config.vocab_size * config.width) + 2 * config.width * 3
    )  # float32 scales
    assert full["device_bytes"] == weights + (2 * 128 * 2 + 8) * 8 * 512
    assert full["bus_bytes"] == 0
    assert (full["rows"], host["rows"], codes["rows"]) == (1, 2, 4)  # what host_gib holds
    for row, row_bytes in ((host, 2 * 128 * 2), (codes, 2 * 128)):
        n_heads = 8 * row["rows"]
        topk = 25
        assert n_heads * (topk + 72) <= row["read_per_step"] <= n_heads * (2 * topk + 72)
        assert 0 < row["missed_per_step"] < row["read_per_step"]
        assert row["bus_bytes"] == row["missed_per_step"] * row_bytes
        assert row["fraction"] == max(row["device_floor_us"], row["bus_floor_us"]) / row["step_us"]


def test_a_split_asks_by_tokens_that_share_no_prompt():
    """Queries of one prompt are alike, and would find more on the device than a step's."""
    config = decode_model.config_of("tiny", 2)
    ids = np.array([[3, 5, 3], [5, 5, 9]])
    asked = a2ats_split._asked(decode_model.random("tiny", config, 0), ids)
    assert len(asked) == 2
    for q in (np.asarray(x, np.float32) for x in asked):
        assert q.shape == (3, 2, 1, config.n_kv_heads, config.group, config.head_dim)
        by_token = {token: q[token == ids.T] for token in (3, 5, 9)}
        for own in by_token.values():
            np.testing.assert_allclose(own, own[:1].repeat(len(own), 0), rtol=1e-2, atol=1e-2)
        assert np.abs(by_token[3][0] - by_token[5][0]).max() > 0.1


def test_the_same_command_goes_on_from_its_rows(measured, monkeypatch, capsys):
    monkeypatch.setattr(a2ats_speed, "timed", pytest.fail)
    monkeypatch.setattr(a2ats_speed, "split", pytest.fail)
    assert speed(measured[0]) == 0
    assert "times the tokens per second" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", [0.5, 0.8])
def test_synthetic_tokens_are_found_again_as_often_as_wanted(wanted):
    found = locality(1000, 30, 4, 240, wanted, 0)
    assert abs(found.hit_rate - wanted) < 0.02
    assert 30 < found.union <= 120


def test_steps_of_the_model_find_about_as_many_as_wanted():
    """Of the tokens that are ranked; 72 are read in every step, and lie there."""
    settings = dataclasses.replace(TINY, hot=0.4, hit_rate=0.8, steps=32, samples=2)
    model, method, found = a2ats_speed._model(settings, case_of("tiny/1:1x1024"), 16)
    hit_rate = timed(model, method, 1024, 1, settings=settings)["hit_rate"]
    assert abs(hit_rate - (found.union * settings.hit_rate + 72) / (found.union + 72)) < 0.04


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("decode",)}, "a part is one of throughput, small, split, context, prefill, got decode"),
        ({"bits": (4,)}, r"16 or 8 bits, got settings.bits=\(4,\)"),
        ({"context": "tiny"}, "a case is shape:batch x tokens"),
    ],
)
def test_what_is_not_to_be_timed_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        speed(dataclasses.replace(TINY, out=tmp_path, **changes))
