"""Tests the parts of the comparison; tests/smoke/test_compare.py runs the whole."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import MODELS as METHOD_MODELS
from method_cases import codebooks
from rich.console import Console

import kvjax
from experiments import batch, options, passkey, plan, plot, plugin, report
from experiments.clock import timed
from experiments.compare import Settings
from kvjax import text
from kvjax.methods import make
from tests.tiny_models import byte_tokenizer

METHOD = """
from dataclasses import dataclass
from kvjax.method import CacheMethod

@dataclass(frozen=True)
class Mine(CacheMethod):
    '''Keeps everything.'''
    depth: int = 3
"""


# Text and pass keys.


def test_excerpts_are_whole_apart_and_chosen_by_the_seed():
    ids = list(range(1000))
    parts = text.excerpts(ids, 4, 100, seed=3)
    assert parts.shape == (4, 100)
    assert (np.diff(parts, axis=1) == 1).all()
    assert len(np.unique(parts)) == 400
    assert (parts == text.excerpts(ids, 4, 100, seed=3)).all()
    assert (parts != text.excerpts(ids, 4, 100, seed=4)).any()


def test_a_text_that_is_too_short_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a text holds all excerpts, got 399 tokens for 4 of 100"):
        text.excerpts(list(range(399)), 4, 100, seed=0)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="a text file is UTF-8"):
        text.read_text(str(tmp_path / "a.txt"))
    with pytest.raises(FileNotFoundError):
        text.read_text(str(tmp_path / "none.txt"))
    (tmp_path / "b.txt").write_text("naïve", encoding="utf-8")
    assert text.read_text(str(tmp_path / "b.txt")) == "naïve"
    assert len(text.read_text(text.PROSE)) > 300_000


@pytest.mark.parametrize("depth", passkey.DEPTHS)
def test_a_pass_key_lies_at_its_depth_and_the_text_fills_the_context(depth):
    tokenizer = byte_tokenizer()
    ids = passkey.context(tokenizer, "48213", depth, 3000)
    assert 3000 - 91 < len(ids) <= 3000
    hidden = tokenizer.decode(ids)
    assert hidden.count("48213") == 2
    assert abs(hidden.index("48213") / len(hidden) - depth) < 0.1


def test_a_context_without_room_for_filler_is_refused():
    with pytest.raises(ValueError, match=r"has room for filler beside its \d+ tokens, got n_tokens=250"):
        passkey.context(byte_tokenizer(), "48213", 0.5, 250)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" 48213.", True),
        (" 48213 and 99999", True),
        (" the key: 48213", True),
        (" 4821", False),
        (" 482130", False),
        (" 99999, not 48213", False),
        (" the pass key", False),
        ("", False),
    ],
)
def test_an_answer_is_graded_by_its_first_digits(answer, found):
    assert passkey.graded(answer, "48213") is found


def test_keys_are_five_digits_and_fresh():
    keys = passkey.keys(0)
    assert len(set(keys)) == 5
    assert all(len(key) == 5 and key.isdigit() for key in keys)
    assert keys == passkey.keys(0) != passkey.keys(1)


# The batch.


def laid_out(**changes):
    sizes = {"context": 400, "continuation": 60, "docs": 2, "seed": 0} | changes
    return batch.lay_out(byte_tokenizer(), text.PROSE, **sizes)


def test_rows_hold_context_and_question_and_what_follows_is_forced():
    made = laid_out()
    question = byte_tokenizer().encode(passkey.QUESTION)
    n = made.n_question
    assert n == len(question)
    assert [len(row) for row in made.prompts[:2]] == [400 + n] * 2
    for row, forced in zip(made.prompts[:2], made.unseen[:2], strict=True):
        assert row[400:] == tuple(forced[:n])  # the prose that stands in the question's place
        assert (forced >= 0).all()
    for row, forced in zip(made.prompts[2:], made.unseen[2:], strict=True):
        assert row[-n:] == tuple(question) == tuple(forced[:n])
        assert (forced[n : n + passkey.N_ANSWER] == -1).all()
        assert (forced[n + passkey.N_ANSWER :] == -2).all()
    assert (made.seen[:2] == -2).all()
    assert (made.seen[2:, : passkey.N_ANSWER] == -1).all()
    assert (made.seen[2:, passkey.N_ANSWER :] == -2).all()
    assert made.seen.shape == made.unseen.shape == (7, 60)
    assert made.total == 460


def test_the_digest_names_the_tokens():
    assert laid_out().digest == laid_out().digest
    assert len({laid_out(**c).digest for c in ({}, {"seed": 1}, {"docs": 3}, {"continuation": 61})}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"continuation": 30},
            r"a continuation goes beyond the 38 tokens of the question, got continuation=30",
        ),
        ({"docs": 0}, "sizes are at least 1, got context=400, continuation=60, docs=0"),
        ({"context": -1}, "sizes are at least 1"),
    ],
)
def test_sizes_that_cannot_be_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        laid_out(**changes)


# The rows.


def test_every_method_has_rows_and_only_evicting_ones_see_the_question():
    trials = plan.plan((), (1.0, 0.5, 0.25), 1000, kvjax.METHODS)
    assert trials[0] == plan.Trial("full", make("full"), 1.0, 1000, "unseen")
    names = [t.name for t in trials]
    every = {*kvjax.METHODS, "kivi8", "kivi4", "snapkv+kivi4"} - {"kivi"}
    assert set(names) == every - {"a2ats"}  # which needs a calibration
    rows = {(t.name, t.ratio, t.question): t for t in trials}
    assert len(rows) == len(trials)
    assert rows["snapkv", 0.25, "seen"].method == make("snapkv", budget=250)
    assert rows["quest", 0.5, "unseen"].method == make("quest", budget=500)
    assert ("quest", 0.5, "seen") not in rows
    assert rows["kivi4", 1.0, "unseen"].method == make("kivi", bits=4)
    assert names.count("full") == names.count("kivi8") == 1
    assert not any(t.ratio == 1 and t.method.evicts for t in trials)


def test_a_method_that_needs_a_calibration_has_rows_where_there_is_one():
    books = codebooks(METHOD_MODELS["G2"])
    trials = plan.plan((), (0.5, 0.25), 1000, kvjax.METHODS, calibration=books, far=books.far)
    rows = {t.ratio: t.method for t in trials if t.name == "a2ats"}
    assert {ratio: m.topk for ratio, m in rows.items()} == {0.5: 0.5, 0.25: 0.25}
    with pytest.raises(ValueError, match="a2ats needs calibration"):
        plan.plan(("a2ats",), (0.5,), 1000, kvjax.METHODS)


def test_methods_may_be_chosen_with_settings():
    trials = plan.plan(("snapkv:window=16", "full"), (0.5,), 100, kvjax.METHODS)
    assert [(t.name, t.question) for t in trials] == [
        ("full", "unseen"),
        ("snapkv:window=16", "unseen"),
        ("snapkv:window=16", "seen"),
    ]
    assert trials[1].method == make("snapkv", budget=50, window=16)


@pytest.mark.parametrize(
    ("names", "budgets", "message"),
    [
        (("snapvk",), (0.5,), "did you mean 'snapkv'"),
        (("snapvk",), (1.0,), "did you mean 'snapkv'"),
        (("snapkv:windo=3",), (1.0,), "did you mean 'window'"),
        ((), (4.0,), r"a budget is a share in \(0, 1\], got 4.0: did you mean 0.25"),
        ((), (0.0,), r"a budget is a share in \(0, 1\], got 0.0"),
        ((), (-1.0,), r"a budget is a share in \(0, 1\], got -1.0"),
    ],
)
def test_wrong_methods_and_budgets_are_refused(names, budgets, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(names, budgets, 1000, kvjax.METHODS)


def test_a_plugin_is_a_method_under_its_files_name(tmp_path):
    (tmp_path / "mine.py").write_text(METHOD)
    kinds = plugin.load(tmp_path / "mine.py")
    trials = plan.plan(("mine:depth=5",), (1.0,), 100, kvjax.METHODS | kinds)
    assert [t.name for t in trials] == ["full", "mine:depth=5"]
    assert trials[1].method == kinds["mine"](depth=5)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("x = 1", ValueError, "a plugin defines a CacheMethod that is a frozen dataclass, got"),
        (
            "import nothing_of_this_name",
            ValueError,
            "a plugin is a module that runs, got ModuleNotFoundError",
        ),
        (None, FileNotFoundError, "a plugin is a .py file"),
    ],
)
def test_a_file_that_is_no_plugin_is_refused(tmp_path, source, error, message):
    if source is not None:
        (tmp_path / "broken.py").write_text(source)
    with pytest.raises(error, match=message):
        plugin.load(tmp_path / "broken.py")


# Options.


def test_a_toml_file_gives_options_and_the_command_line_wins(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('docs = 7\nmethods = ["full", "kivi4"]\nbudgets = [0.5]\nmodel = "x"\n')
    made = options.parse(Settings, ["--config", str(path), "--docs", "8"], "")
    assert made == Settings(docs=8, methods=("full", "kivi4"), budgets=(0.5,), model="x")
    assert options.parse(Settings, [f"--config={path}"], "").docs == 7
    assert options.parse(Settings, options.as_arguments(made), "") == made
    assert options.as_arguments(Settings()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dosc = 7", r"a key of a\.toml is one of .*, got 'dosc': did you mean 'docs'"),
        ("docs = = 7", "a configuration is TOML"),
    ],
)
def test_a_wrong_toml_file_is_refused(tmp_path, content, message):
    (tmp_path / "a.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        options.parse(Settings, ["--config", str(tmp_path / "a.toml")], "")


def test_wrong_options_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="--config is followed by a file, got nothing"):
        options.parse(Settings, ["--config"], "")
    with pytest.raises(FileNotFoundError):
        options.parse(Settings, ["--config", str(tmp_path / "none.toml")], "")
    (tmp_path / "a.toml").write_text('docs = "many"')
    for arguments in (["--dosc", "4"], ["--config", str(tmp_path / "a.toml")]):
        with pytest.raises(SystemExit, match="2"):
            options.parse(Settings, arguments, "")
        assert "--docs" in "".join(capsys.readouterr())


def test_flags_of_a_file_are_flags():
    @dataclass(frozen=True)
    class Flags:
        fast: bool = False

    assert options.as_arguments(Flags(fast=True)) == ["--fast"]
    assert options.parse(Flags, ["--fast"], "").fast


# Times.


def test_compiling_is_told_from_running():
    @jax.jit
    def work(x):
        for _ in range(300):
            x = jnp.sin(x) @ x
        return x

    with timed() as first:
        work(jnp.eye(4)).block_until_ready()
    with timed() as second:
        work(jnp.eye(4)).block_until_ready()
        time.sleep(0.05)
    assert first.compile_s > first.run_s > 0
    assert second.compile_s == 0
    assert second.run_s >= 0.05


def test_another_threads_compiling_is_not_ours():
    other = threading.Thread(target=lambda: jax.jit(lambda x: x * 3 + 1)(jnp.ones(5)).block_until_ready())
    with timed() as span:
        other.start()
        other.join()
    assert span.compile_s == 0
    assert span.run_s > 0


# Table, claims and plot.


def rows():
    """Figures of three methods, as a run stores them."""
    shared = {
        "model": "some/tiny",
        "dtype": "float32",
        "batch": 9,
        "prefill_s": 1.0,
        "top1": 0.9,
        "passkey": 3,
    }
    shared |= {"replay_s": 1.0, "decode_step_s": 0.1, "compile_s": 2.0}
    made = []
    for name, ratio, held, kl in [
        ("full", 1.0, 1.0, 0.0),
        ("snapkv", 0.5, 0.5, 0.01),
        ("snapkv", 0.25, 0.25, 0.1),
        ("kivi8", 1.0, 0.3, 1e-5),
        ("kivi4", 1.0, 0.2, 0.0),
    ]:
        row = {"name": name, "ratio": ratio, "budget": round(400 * ratio), "question": "unseen", "kl": kl}
        row |= {
            "perplexity": 12.5,
            "held": held,
            "read": held,
            "bytes_held": 1e6 * held,
            "bytes_read": 1e6 * held,
        }
        made.append(shared | row)
    return [*made, made[1] | {"question": "seen", "perplexity": None, "kl": None, "top1": None}]


def test_the_table_shows_every_row_in_80_columns():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(rows()))
    shown = console.export_text()
    assert shown.count("snapkv") == 3
    assert "0.0100" in shown
    assert "–" in shown
    assert "…" not in shown


def test_claims_are_named_by_method_and_budget():
    full, snapkv, *_, seen = rows()
    trials = {
        row["name"]: plan.Trial(row["name"], make("full"), row["ratio"], 1, "unseen") for row in rows()[:2]
    }
    assert report.claims(trials["full"], full) == {
        "full.perplexity": 12.5,
        "full.kl": 0.0,
        "full.passkey": 3,
    }
    assert report.claims(trials["snapkv"], snapkv)["snapkv.kl@0.5"] == 0.01
    trial = plan.Trial("snapkv", make("full"), 0.5, 1, "seen")
    assert report.claims(trial, seen) == {"snapkv.passkey_seen@0.5": 3}


@pytest.mark.parametrize("made", [rows(), rows()[:1]], ids=["several methods", "full alone"])
def test_the_plot_is_a_picture_beside_the_results(tmp_path, made):
    path = plot.path_of(tmp_path / "cpu.json")
    plot.draw(made, path)
    assert path == tmp_path / "cpu.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.png"]


def test_widths_of_one_storage_are_one_line():
    lines = plot._lines(rows())
    assert {name: len(line) for name, line in lines.items()} == {"snapkv": 2, "kivi": 2}
    assert [row["held"] for row in lines["snapkv"]] == [0.5, 0.25]


def test_names_that_would_overlap_move_apart_and_keep_their_order():
    spans = [(0, 50), (10, 60), (100, 150)]
    moved = plot._apart([10, 12, 11], spans)
    assert moved[1] - moved[0] >= 12.4
    assert moved[2] == 11
    assert moved[0] + moved[1] == pytest.approx(22)


def test_the_plots_path_is_beside_any_results():
    assert plot.path_of(Path("a/b-2.json")) == Path("a/b-2.png")
