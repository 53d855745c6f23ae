"""Runs A²ATS's experiments on a tiny random model."""

import dataclasses
import math

import pytest
from method_cases import codebooks as random_codebooks

import kvjax
from experiments import a2ats, a2ats_distances, a2ats_hits, a2ats_quality, a2ats_recall, results, scoring
from kvjax import text
from kvjax.calibrate import codebooks
from kvjax.methods.a2ats import A2ATS
from kvjax.model import fingerprint
from tests.tiny_models import byte_tokenizer, tiny

SIZES = [
    "--docs", "1", "--context", "128", "--queries", "3", "--ratios", "0.05", "0.2", "--centroids", "32",
    "--tokens", "1024", "--iterations", "9", "--steps", "20", "--window", "16", "--n-sinks", "2",
    "--far", "64",
]  # fmt: skip


QUALITY = [
    "--docs", "2", "--context", "200", "--rest", "32", "--ratios", "0.1", "1", "--methods", "quest",
    "snapkv:window=8", "--keys", "2", "--novel-keys", "1", "--key-context", "336", "--workers", "3",
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
    data = results.load(path)
    rows = {row["ratio"]: row for row in data["rows"]}
    assert [(row["layer"], row["ratio"]) for row in data["rows"]] == [(1, 0.05), (1, 0.2)]  # 0 has a window
    for ratio, row in rows.items():
        ways = ("exact", "far", "rotated", "plain", "aware", "rounded", "refined", "quest")
        for name, of in ((name, row[name]) for name in ways):
            assert all(math.isfinite(of[k]) and 0 < of[k] <= 1.00001 for k in ("mass", "mass_union", "read"))
            assert of["recall"] <= row["exact"]["recall"] == 1, name
            assert of["mass"] <= row["exact"]["mass"] + 1e-6 or name == "quest"
            assert data["claims"][f"smollm2.{name}.mass@{ratio:g}"] == of["mass"]
    assert rows[0.05]["exact"]["mass"] < rows[0.2]["exact"]["mass"]
    assert abs(rows[0.2]["quest"]["read"] - rows[0.2]["aware"]["read"]) < 16 / 96

    def measures(*args):
        raise AssertionError("a stored row is measured again")

    monkeypatch.setattr(a2ats_recall, "_statistics", measures)
    assert a2ats.main(arguments) == 0
    assert results.load(path) == data


def test_each_distance_is_ranked_once(tmp_path, monkeypatch):
    model = tiny(byte_tokenizer(), context=512, windows=(24, None))
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)
    arguments = [
        "distances", "--docs", "1", "--context", "128", "--queries", "3", "--ratios", "0.1", "--distances",
        "16", "64", "--window", "16", "--n-sinks", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    assert a2ats.main(arguments) == 0
    (path,) = (tmp_path / "a2ats_distances").glob("*.json")
    data = results.load(path)
    assert [(row["layer"], row["far"]) for row in data["rows"]] == [(1, None), (1, 16), (1, 64)]
    exact, *far = data["rows"]
    assert exact["recall"] == 1
    assert all(0 < row["recall"] < 1 for row in far)
    assert far[0]["recall"] != far[1]["recall"]
    assert data["claims"]["smollm2.16.recall@0.1"] == far[0]["recall"]
    monkeypatch.setattr(a2ats_distances, "records", pytest.fail)
    assert a2ats.main(arguments) == 0
    assert results.load(path) == data


@pytest.mark.parametrize("more", [[], ["--learned", text.PROSE]])
def test_texts_that_codebooks_were_made_from_are_not_asked_about(more, tmp_path, capsys):
    assert a2ats.main(["recall", *more, "--out", str(tmp_path)]) == 2
    assert "texts that they were not made from" in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """The model, one of whose layers has a window, one is read in full and one is ranked; its codebooks."""
    model = tiny(byte_tokenizer(), context=512, windows=(24, None, None))
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)
    books = dataclasses.replace(
        random_codebooks(model), flat=(True, True, False), model=fingerprint(model), window=16
    )
    codebooks.save(books, tmp_path / "books")
    return model, books


def quality(tmp_path, *more: str) -> int:
    folders = ["--calibration", str(tmp_path / "books"), "--out", str(tmp_path)]
    return a2ats.main(["quality", *QUALITY, *folders, *more])


def test_quality_is_measured_once_at_equal_bytes(tmp_path, monkeypatch, calibrated):
    assert quality(tmp_path) == 0
    (path,) = (tmp_path / "a2ats_quality").glob("*.json")
    data = results.load(path)
    rows = {(row["name"], row["ratio"]): row for row in data["rows"]}
    names = ("a2ats", "quest", "snapkv:window=8")
    others = [(name, ratio) for ratio in (0.1, 1) for name in names[1:]]
    assert list(rows) == [("full", 1), ("a2ats", 0.1), ("a2ats", 1), *others]  # others read as much as ours
    assert len(data["rows"]) == len(rows)
    assert path.with_suffix(".png").stat().st_size > 10_000
    full, ours, others = rows["full", 1], rows["a2ats", 0.1], [rows[name, 0.1] for name in names[1:]]
    assert (
        full["tokens_layers"] == [216.5] * 2
    )  # 200, and the mean of 1 to 32; the layer with a window is out
    assert full["bytes_read"] == 216.5 * 2 * 2 * (2 * 8 * 4 + 8)  # heads, layers, K and V, position and mass
    least = 8 + 16 + 20  # sinks, window, a tenth of the tokens
    assert ours["tokens_layers"][0] == 216.5
    assert least < ours["tokens_layers"][1] < least + 23
    assert 0 <= full["kl"] < 1e-6 < min(row["kl"] for row in (ours, *others))
    assert rows["a2ats", 1]["kl"] < 1e-6
    assert rows["a2ats", 1]["tokens"] == full["tokens"]
    page = 16 * 2 * (2 * 8 * 4 + 8)
    for row in others:
        assert abs(row["bytes_read"] - ours["bytes_read"]) < page, row["name"]
        assert abs(row["bytes_read_filler"] - ours["bytes_read_filler"]) < page, row["name"]
    assert data["claims"]["smollm2.quest.kl@0.1"] == others[0]["kl"]
    assert data["claims"]["smollm2.a2ats.passkey_filler@0.1"] == ours["passkey_filler"]

    def measures(*args):
        raise AssertionError("a stored row is measured again")

    for name in ("Prose", "Answers"):
        monkeypatch.setattr(scoring, name, measures)
    assert quality(tmp_path) == 0
    assert results.load(path) == data


def test_another_calibration_is_another_row(calibrated):
    model, books = calibrated
    other = dataclasses.replace(books, centroids=random_codebooks(model, seed=1).centroids)
    one, same, another = (
        a2ats_quality.row_of(A2ATS(0.1, x, far=x.far)) for x in (books, dataclasses.replace(books), other)
    )
    assert one == same != another


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--ratios", "1.5"], 2, "topk is tokens, 1 or more, or a share"),
        (["--methods", "kivi"], 2, "as many bytes by its budget, got 'kivi': leave it out"),
        (["--methods", "snap"], 2, "did you mean 'snapkv'?"),
        (["--methods", "quest:dense_layers=3"], 2, "a method reads more with a larger budget"),
        (["--methods", "snapkv:window=100"], 2, "holds more than its window"),
        (["--calibration", "nowhere"], 1, "codebooks are a folder of `kvjax calibrate a2ats`"),
        (["--calibration", "."], 2, "a calibration is a whole checkpoint"),
    ],
)
def test_what_cannot_be_compared_is_refused(more, code, message, tmp_path, calibrated, capsys):
    assert quality(tmp_path, *more) == code
    assert message in capsys.readouterr().err.replace("\n", " ")


HITS = [
    "--docs", "2", "--context", "200", "--rest", "80", "--ratios", "0.03", "0.1", "--hot", "0", "1.1", "4",
    "--block", "4",
]  # fmt: skip


def hits(tmp_path, *more: str) -> int:
    folders = ["--calibration", str(tmp_path / "books"), "--out", str(tmp_path)]
    return a2ats.main(["hits", *HITS, *folders, *more])


def test_lines_are_simulated_once(tmp_path, monkeypatch, calibrated):
    assert hits(tmp_path) == 0
    (path,) = (tmp_path / "a2ats_hits").glob("*.json")
    data = results.load(path)
    rows = {(row["ratio"], row.get("block"), row.get("hot")): row for row in data["rows"]}
    each = [(None, None), *((block, hot) for block in (1, 4) for hot in (0, 1.1, 4))]
    assert list(rows) == [(ratio, *one) for ratio in (0.03, 0.1) for one in each]
    assert path.with_suffix(".png").stat().st_size > 10_000
    for ratio, n in ((0.03, 8), (0.1, 27)):  # of 264 to 280 tokens
        read = rows[ratio, None, None]
        always = 8 + 16  # sinks and window
        assert read["layers"] == [2]  # the others have a window, or are read in full
        assert read["step_tokens"] == read["step_tokens_layers"][0] > always + n - 1
        assert 0.95 < read["union"] < 2
        assert abs((read["step_tokens"] - always) / read["union"] - n) < 1
        none, some, many = (rows[ratio, 1, hot] for hot in (0, 1.1, 4))
        assert none["brought"] == pytest.approx(read["step_tokens"] * (1 - none["hit_rate"]))
        assert none["brought_bytes"] == none["brought"] * 2 * 2 * 8 * 4  # heads, K and V
        assert none["hit_rate_ranked"] == 0
        assert some["lines"] == round(1.1 * read["step_tokens"])
        assert 0 < none["hit_rate"] < some["hit_rate"] < many["hit_rate"] < 1
        assert many["hit_rate_ranked"] < many["hit_rate"]
        assert 0.5 < many["hit_rate_tier"] < many["hit_rate"] + 0.01
        assert many["brought_tier"] == pytest.approx((1 - many["hit_rate_tier"]) * read["step_tokens"])
        assert rows[ratio, 4, 4]["lines"] == round(read["step_tokens"])
        assert none["hit_rate"] > rows[ratio, 4, 0]["hit_rate"]
    assert "hit_rate_tier" not in rows[0.1, 1, 1.1]  # 90 may be read
    assert data["claims"]["smollm2.hit_rate@4"] == rows[0.03, 1, 4]["hit_rate"]
    assert data["claims"]["smollm2.hit_rate_tier@4"] == rows[0.03, 1, 4]["hit_rate_tier"]
    assert data["claims"]["smollm2.hit_rate_blocks@1.1"] == rows[0.03, 4, 1.1]["hit_rate"]
    assert data["claims"]["smollm2.union@0.1"] == rows[0.1, None, None]["union"]

    def records(*args):
        raise AssertionError("a stored row is measured again")

    monkeypatch.setattr(a2ats_hits, "record", records)
    assert hits(tmp_path) == 0
    assert results.load(path) == data


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rest", "64"], "steps after the first 64 are counted, got (rest=64): decode more tokens"),
        (["--block", "1"], "lines of 0 or more, got (block=1, hot=(0.0, 1.1, 4.0)): single tokens"),
        (["--hot", "-1"], "lines of 0 or more, got (block=4, hot=(-1.0,)): single tokens"),
        (["--ratios", "1.5"], "topk is tokens, 1 or more, or a share"),
    ],
)
def test_steps_and_lines_that_say_nothing_are_refused(more, message, tmp_path, calibrated, capsys):
    assert hits(tmp_path, *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_ranked_layers_is_refused(tmp_path, calibrated, capsys):
    _, books = calibrated
    codebooks.save(dataclasses.replace(books, flat=(True, True, True)), tmp_path / "books")
    assert hits(tmp_path) == 2
    message = "in layers that are ranked, got (flat=(True, True, True), windows=(24, None, None)): take"
    assert message in " ".join(capsys.readouterr().err.split())
