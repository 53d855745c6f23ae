"""Times Chelsea and the full cache on a tiny random model: every row is there once, its bytes are right."""

import dataclasses
import math

import pytest

from experiments import cases, chelsea_prompts, chelsea_speed, chelsea_steps, decode_model, results
from experiments.chelsea_cases import chelsea
from experiments.chelsea_speed import Speed, speed

CASE = "tiny/1:1x1024"
TINY = Speed(
    cases=(CASE,), line=(CASE, "tiny/1:1x2048"), throughput=CASE, end_to_end=CASE, cluster=CASE,
    streaming=CASE, slack=8, steps=4, samples=1, new=4, chunk=256, stream_chunk=256, copy_mib=1,
)  # fmt: skip
SLOT = 2 * 128 * 2 + 8  # bytes of a key, a value, a position and a mass
PARTS = {"decode": 6, "line": 1, "throughput": 1, "end_to_end": 2, "cluster": 1, "streaming": 1}


def stored(folder):
    (path,) = (folder / "chelsea_speed").glob("*.json")
    return path, results.load(path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    settings = dataclasses.replace(TINY, out=tmp_path_factory.mktemp("speed"))
    assert speed(settings) == 0
    return settings


def rows(settings, part):
    return [row for row in stored(settings.out)[1]["rows"] if row["part"] == part]


def test_every_part_has_its_rows_and_claims(measured):
    path, data = stored(measured.out)
    assert {part: len(rows(measured, part)) for part in PARTS} == PARTS
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert data["claims"].keys() == {
        f"chelsea.{name}"
        for name in (
            "decode_speedup_tiny_l1_b1_1k", "decode_speedup_ragged_tiny_l1_b1_1k", "byte_limit_fraction_min",
            "speedup_over_byte_ratio_min", "cluster_share_of_decode", "line_slope_ratio", "line_deviation",
            "equal_memory_throughput", "end_to_end_speedup", "cluster_share_of_prefill",
            "streaming_peak_kv_fraction",
        )
    }  # fmt: skip
    assert all(math.isfinite(value) for value in data["claims"].values())


def test_a_step_is_compared_with_its_bytes(measured):
    config = decode_model.config_of("tiny", 1)
    weights = (
        2 * (config.n_params() - config.vocab_size * config.width) + 2 * config.width * 3
    )  # float32 scales
    full, uniform, ragged = rows(measured, "decode")[:3]
    assert [row["budgets"] for row in (full, uniform, ragged)] == ["full", "uniform", "ragged"]
    assert full["bytes"] == weights + SLOT * 8 * (1024 - 3.5)  # eight steps are timed, up to 1024 tokens
    assert uniform["bytes"] == weights + SLOT * 8 * (204 - 8 + 2.5)  # four of them without clustering
    assert 0.9 * uniform["bytes"] < ragged["bytes"] <= uniform["bytes"]
    for row in (uniform, ragged):
        assert row["byte_ratio"] == full["bytes"] / row["bytes"]
        assert row["speedup"] == full["step_us"] / row["amortised_us"]
        assert row["cluster_share"] == pytest.approx(1 - row["step_us"] / row["amortised_us"])
        assert row["fraction"] == row["floor_us"] / row["step_us"]


def test_memory_is_that_of_the_slots(measured):
    (both,) = rows(measured, "throughput")
    assert both["chelsea_rows"] == 5
    assert both["chelsea_kv_bytes"] < 1.01 * both["full_kv_bytes"]
    (row,) = rows(measured, "streaming")
    assert row["fraction"] == row["peak_state_bytes"] / row["full_bytes"]
    assert row["fraction"] == pytest.approx((204 + 256) / 1024, rel=1e-3)
    assert row["end_bytes"] < row["peak_state_bytes"]


def test_end_to_end_is_the_whole_way(measured):
    full, chelsea = rows(measured, "end_to_end")
    for row in (full, chelsea):
        assert row["total_s"] == row["prefill_s"] + row["decode_s"]
        assert not row["prefill_is_scaled"]
    assert chelsea["speedup"] == full["total_s"] / chelsea["total_s"]


def test_what_is_stored_is_not_measured_again(measured, monkeypatch, capsys):
    def measures(*args, **options):
        raise AssertionError("a stored row is measured again")

    for module, name in (
        (chelsea_speed, "timed"), (chelsea_speed, "served"), (chelsea_speed, "clustering"),
        (chelsea_speed, "streamed"), (decode_model, "random"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, measures)
    before = stored(measured.out)[1]
    assert speed(measured) == 0
    assert stored(measured.out)[1] == before
    assert speed(dataclasses.replace(measured, parts=("decode",))) == 0  # parts share a file
    assert "of the byte limit's rate" in capsys.readouterr().out


def test_few_prompts_stand_for_all_and_say_so(monkeypatch):
    monkeypatch.setattr(chelsea_prompts, "serve", lambda *args, **options: (3.0, 0.0))
    monkeypatch.setattr(chelsea_prompts, "_answer", lambda *args: 1.0)
    model = decode_model.random("tiny", decode_model.config_of("tiny", 1), 0)
    settings = dataclasses.replace(TINY, prompt_rows=1)
    row = chelsea_prompts.served(model, chelsea(settings, 1024), 1024, 2, settings=settings)
    assert row["prefill_is_scaled"]
    assert (row["prefill_rows"], row["prefill_s"], row["total_s"]) == (1, 6.0, 7.0)


def test_a_batch_that_does_not_fit_is_made_smaller(capsys):
    class Full(cases.jax.errors.JaxRuntimeError):
        pass

    def run(rows):
        if rows > 50:
            raise Full("RESOURCE_EXHAUSTED: out of memory")
        return {"of": rows}

    assert cases.fitting(64, run) == (48, {"of": 48})
    assert "64 rows do not fit\n56 rows do not fit" in capsys.readouterr().out
    with pytest.raises(Full):
        cases.fitting(128, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("decode", "lines")}, "a part is one of decode, .*, got lines"),
        ({"cluster": "tiny-1x1024"}, "a case is shape:batch x tokens"),
        ({"cases": ("9b:1x1024",)}, "a shape is one of"),
        ({"steps": 8}, "a period of slack steps is two or more whole calls"),
        ({"line": (CASE,), "parts": ("line",)}, "a line has one shape and batch at two lengths or more"),
        ({"keep": 0.999, "parts": ("decode",)}, "a context fills its slots before its steps are timed"),
    ],
)
def test_wrong_settings_are_explained(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(chelsea_speed, "served", None)
    settings = dataclasses.replace(TINY, out=tmp_path, **change)
    if "keep" in change:
        model = decode_model.random("tiny", decode_model.config_of("tiny", 1), 0)
        with pytest.raises(ValueError, match=message):
            chelsea_steps.timed(model, chelsea(settings, 1024), 1024, 1, settings=settings)
    else:
        with pytest.raises(ValueError, match=message):
            speed(settings)
