"""Chelsea and its budgets of heads: masses are tokens, budgets hold, and bad settings say what to do."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from method_cases import BUDGET, FORCED, MODELS, NEW, PROMPTS, run, settings, tiny

import kvjax
from kvjax import budgets, cache, decoding, storage, text
from kvjax.budgets import Shares
from kvjax.clustering import Matching
from kvjax.methods import make
from kvjax.methods.chelsea import Chelsea
from kvjax.model import fingerprint
from tests.tiny_models import byte_tokenizer

MODEL = MODELS["G2"]
ROW = (40, 56)  # budgets of the heads of each layer
CHELSEA = make("chelsea", **settings("chelsea", np.array([ROW])))
SHALLOW = tiny(2, windows=(None,))  # one layer: compiles in half the time
HOW = Matching(chunk=16, stride=2, similarity="cosine", before_rope=True, n_sinks=4, n_recent=8)
WIDTH, CHUNK, ROOM = 64, 32, 200


def chelsea(**changes) -> Chelsea:
    return make("chelsea", **settings("chelsea") | changes)


def sums(kv, x=None):
    """Sums a packed array, the masses, over each head: [B K]."""
    x = np.asarray(kv.mass if x is None else x)
    return np.stack(
        [x[:, f : f + s].sum(1) for f, s in zip(cache.starts(kv.slots), kv.slots, strict=True)], 1
    )


def check(state, seen, row=ROW, *, tokens=lambda kv: kv.mass):
    """Asserts that every head holds all the tokens, within its budget and without gaps."""
    for kv in state:
        assert kv.slots == tuple(row)
        np.testing.assert_array_equal(np.asarray(kv.seen), seen)
        np.testing.assert_array_equal(sums(kv, tokens(kv)), np.stack([seen, seen], 1))
        count = np.asarray(cache.count(kv))
        assert (count <= row).all()
        assert (count >= np.minimum(np.stack([seen, seen], 1), np.array(row) - CHELSEA.slack)).all()
        np.testing.assert_array_equal(np.asarray(kv.fill), count)


lengths = st.tuples(st.integers(1, WIDTH), st.integers(0, WIDTH))
reads = st.tuples(st.sampled_from(["end", "chunk"]), lengths)
steps = st.tuples(st.just("decode"), st.tuples(st.integers(0, 9), st.integers(0, 9)))


@limits(max_examples=8)
@given(reads, st.lists(st.one_of(reads, steps), min_size=1, max_size=3), st.integers(0, 10**6))
def test_masses_are_the_tokens_seen_and_budgets_hold(first, later, seed):
    """Through any mix of prompts, read either way, and decode steps; rows are of different lengths."""
    rng = np.random.default_rng(seed)
    state, seen = None, np.zeros(2, int)
    for kind, counts in (first, *later):
        if kind != "decode":
            rows = [rng.integers(0, 97, n).tolist() for n in counts]
            ids = np.stack([np.pad(row, (WIDTH - len(row), 0), constant_values=-1) for row in rows]).astype(
                int
            )
            logits, state = kvjax.prefill(
                SHALLOW, ids, CHELSEA, room=ROOM, chunk=CHUNK, compress=kind, state=state
            )
            seen = seen + counts
            check(state, seen)
            continue
        for i in range(max(counts)):
            runs = np.array([i < n for n in counts])
            forced = np.where(runs, 7, -2)[:, None]  # -2: the row has ended
            _, logits, state, _ = decoding.decode(SHALLOW, logits, state, CHELSEA, forced)
            seen = seen + runs
            check(state, seen)


@pytest.mark.parametrize("name", MODELS)
def test_a_long_decode_stays_within_the_budget_with_and_without_log_n(name):
    forced = np.full((2, 60), 5, np.int32)
    seen = np.full(2, PROMPTS.shape[1] + 60)
    logits, state = run(MODELS[name], chelsea(), forced=forced)
    check(unbounded(state), seen, (BUDGET,) * 2)
    without, state = run(MODELS[name], chelsea(log_n=False), forced=forced)
    check(unbounded(state), seen, (BUDGET,) * 2, tokens=lambda kv: kv.aux)
    for kv in unbounded(state):
        np.testing.assert_array_equal(np.asarray(kv.mass), np.asarray(kv.aux > 0))
        assert float(kv.aux.max()) > 1
    assert np.isfinite(logits).all()
    assert np.isfinite(without).all()
    assert np.abs(without - logits).max() > 0.1


def unbounded(state):
    """The layers without a window: those of the method."""
    return [kv for kv in state if kv.layer.window is None]


def test_sinks_and_recent_tokens_are_never_merged():
    _, full = run(MODEL, make("full"))
    _, state = run(MODEL, chelsea())
    total = PROMPTS.shape[1] + NEW
    kv, dense = state[0], full[0]  # keys of the first layer are the same with every method
    for b, (h, first) in itertools.product(range(2), enumerate(cache.starts(kv.slots))):
        n = int(kv.fill[b, h])
        for part, expected in ((slice(0, 4), range(4)), (slice(n - 8, n), range(total - 8, total))):
            at = slice(first + part.start, first + part.stop)
            assert kv.pos[b, at].tolist() == list(expected)
            assert (kv.mass[b, at] == 1).all()
            old = dense.slots[0] * h + np.array(expected)
            np.testing.assert_allclose(np.asarray(kv.k[b, at]), np.asarray(dense.k)[b, old], atol=1e-5)
        assert float(kv.mass[b, first : first + n].max()) > 1


@pytest.mark.parametrize("length", [3, 40])  # less than a chunk, than the budget
@pytest.mark.parametrize("compress", ["end", "chunk"])
def test_a_prompt_below_the_budget_is_left_as_it_is(length, compress):
    ids, forced = PROMPTS[:, :length], FORCED[:, :4]
    ours, state = run(MODEL, chelsea(), ids=ids, forced=forced, compress=compress, chunk=16)
    dense, full = run(MODEL, make("full"), ids=ids, forced=forced)
    np.testing.assert_allclose(ours, dense, atol=1e-4)
    for kv, other in zip(state, full, strict=True):
        assert set(np.unique(kv.mass)) <= {0.0, 1.0}
        for b, h in itertools.product(range(2), range(2)):
            mine, its = kv.slots[0] * h, other.slots[0] * h
            n = length + 4
            assert kv.pos[b, mine : mine + n].tolist() == list(range(n))
            np.testing.assert_allclose(
                np.asarray(kv.k[b, mine : mine + n]), np.asarray(other.k[b, its : its + n]), atol=1e-4
            )


def test_quantised_slots_merge_like_others():
    kivi = make("kivi", bits=8)
    _, plain = kvjax.prefill(MODEL, PROMPTS, chelsea(), room=NEW)
    logits, state = kvjax.prefill(MODEL, PROMPTS, kvjax.chain(chelsea(), kivi), room=NEW)
    for kv, other in zip(state, plain, strict=True):
        assert isinstance(kv.k, storage.Quantized)
        assert float(kv.mass.max()) > 1
        np.testing.assert_array_equal(np.asarray(kv.mass), np.asarray(other.mass))
        np.testing.assert_array_equal(np.asarray(kv.pos), np.asarray(other.pos))
    seen = np.full(2, PROMPTS.shape[1])
    counts = []
    for _ in range(2 * chelsea().slack):
        forced = np.full((2, 1), 5)
        _, logits, state, _ = decoding.decode(MODEL, logits, state, kvjax.chain(chelsea(), kivi), forced)
        seen = seen + 1
        check(state, seen, (BUDGET,) * 2)
        counts.append(int(state[0].fill[0, 0]))
    assert (np.diff(counts) < 0).any()  # a clustering of codes happened
    assert np.isfinite(np.asarray(logits)).all()
    for kv in state:
        assert np.isfinite(np.asarray(storage.read(kv.k))).all()


def test_a_clustering_in_the_decode_loop_compiles_nothing():
    method = chelsea()
    logits, state = kvjax.prefill(MODEL, PROMPTS, method, room=NEW)
    options = {"forced": np.full((2, 4), -1)}
    _, logits, state, _ = decoding.decode(MODEL, logits, state, method, **options)
    before = decoding._decode._cache_size()
    counts = [int(state[0].fill.max())]
    for _ in range(4):
        _, logits, state, _ = decoding.decode(MODEL, logits, state, method, **options)
        counts.append(int(state[0].fill.max()))
    assert set(np.diff(counts)) == {4, 4 - method.slack}  # with and without
    assert decoding._decode._cache_size() == before


@pytest.mark.parametrize("budget", [27, np.array([[48, 48], [48, 27]])])
def test_budgets_without_room_for_a_chunk_raise(budget):
    with pytest.raises(ValueError, match=r"a budget holds sinks, recent .*, 28 slots, got 27: raise"):
        kvjax.prefill(MODEL, PROMPTS, chelsea(budget=budget), room=NEW)
    with pytest.raises(ValueError, match=r"a budget holds sinks, recent .*, 42 slots, got 41: raise"):
        kvjax.prefill(MODEL, PROMPTS, chelsea(budget=41, slack=30), room=NEW)
    _, state = kvjax.prefill(MODEL, PROMPTS, chelsea(budget=28, slack=2), room=NEW)
    assert state[0].slots == (28, 28)


def test_each_heads_newest_tokens_have_their_share_of_its_slots():
    method = dataclasses.replace(CHELSEA, recent=0.5)
    _, state = kvjax.prefill(SHALLOW, PROMPTS, method, room=NEW)
    for kv in state:
        for head, (first, budget) in enumerate(zip(cache.starts(kv.slots), ROW, strict=True)):
            n = method.matching.newest(budget - method.slack)
            assert n == (budget - method.slack) // 2 > method.n_recent
            for b, end in enumerate(np.asarray(kv.fill)[:, head]):
                mass = np.asarray(kv.mass)[b, first : first + end]
                assert (mass[-n:] == 1).all()
                assert (mass.max() > 1) == (kv.seen[b] > budget)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"stride": 1}, r"2 <= stride <= chunk, got self.stride=1,"),
        ({"stride": 17}, r"2 <= stride <= chunk, got self.stride=17, self.chunk=16"),
        ({"similarity": "cos"}, "similarity is cosine, dot or l2, got self.similarity='cos'"),
        ({"n_sinks": -1}, "n_sinks is at least 0, n_recent and slack are at least 1, got self.n_sinks=-1"),
        ({"n_recent": 0}, "n_recent and slack are at least 1, .*self.n_recent=0"),
        ({"slack": 0}, "n_recent and slack are at least 1, .*self.slack=0"),
        ({"slack": -5}, "n_recent and slack are at least 1, .*self.slack=-5"),
        ({"recent": 1.0}, "recent is a share of the slots, at least 0 and below 1, got self.recent=1.0"),
        ({"rounds": 0}, "a clustering has at least 1 round, got self.rounds=0"),
        ({"budget": np.ones((2, 2, 2), int)}, "a budget is an int or a table"),
    ],
)
def test_bad_settings_raise(bad, message):
    with pytest.raises(ValueError, match=message):
        chelsea(**bad)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 2), "one row per layer, got 3"), ((2, 3), "one entry per KV head")]
)
def test_a_table_of_another_model_raises(shape, message):
    with pytest.raises(ValueError, match=message):
        kvjax.prefill(MODEL, PROMPTS, chelsea(budget=np.full(shape, BUDGET)), room=NEW)


def test_rounds_that_are_too_few_name_the_number_that_would_do():
    with pytest.raises(ValueError, match=r"got self.rounds=1 for 128: rounds=(\d+) would, or None") as error:
        kvjax.prefill(MODEL, PROMPTS, chelsea(rounds=1), room=NEW)
    n = int(str(error.value).split("rounds=")[-1].split()[0])
    _, state = kvjax.prefill(MODEL, PROMPTS, chelsea(rounds=n), room=NEW)
    assert set(np.asarray(state[0].fill).ravel()) == {BUDGET - chelsea().slack}
    with pytest.raises(ValueError, match="none would; raise the budget, or lower slack"):
        kvjax.prefill(MODEL, PROMPTS, chelsea(budget=30, slack=16), room=NEW)


def dense(model, rows=2):
    """A state of whole prompts, which pooled merges work on."""
    return kvjax.prefill(model, PROMPTS[:rows], make("full"), room=1)[1]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_pooled_merges_keep_the_share_and_every_token(keep):
    state = dense(MODEL)
    out = budgets.pool(state, keep, HOW)
    counts = np.stack([np.asarray(cache.count(kv)) for kv in out])  # [L B K]
    assert counts.sum((0, 2)).tolist() == [np.ceil(keep * 4 * PROMPTS.shape[1])] * 2
    assert len(set(counts.ravel().tolist())) > 2  # heads differ
    for kv, old in zip(out, state, strict=True):
        assert kv.slots == old.slots
        assert (sums(kv) == PROMPTS.shape[1]).all()


def test_pooled_merges_leave_windows_alone():
    state = dense(MODELS["G1 with a window"])
    out = budgets.pool(state, 0.5, HOW)
    for a, b in zip(jax.tree.leaves(out[0]), jax.tree.leaves(state[0]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert np.asarray(cache.count(out[1])).sum(1).tolist() == [PROMPTS.shape[1]] * 2


@pytest.mark.parametrize("keep", [0.0, 1.0, 1.5, float("nan")])
def test_shares_that_are_none_raise(keep):
    with pytest.raises(ValueError, match="a share is between 0 and 1, got keep="):
        budgets.pool(dense(MODEL), keep, HOW)
    with pytest.raises(ValueError, match="a share is between 0 and 1, got keep="):
        budgets.calibrate(MODEL, PROMPTS, keep, chelsea())


def test_a_share_that_merges_cannot_reach_raises():
    with pytest.raises(
        ValueError, match=r"merges reach the share, got keep=0.1 of \[360, 360\] slots: raise"
    ):
        budgets.pool(dense(MODEL), 0.1, HOW)  # the sinks and the recent alone are 0.13


def test_calibrated_shares_survive_a_file(tmp_path):
    found = budgets.calibrate(MODEL, PROMPTS, 0.5, chelsea())
    shares = np.array(found.shares)
    assert shares.shape == (2, 2)
    np.testing.assert_allclose(shares.mean(), 1.0, atol=1e-3)
    assert np.ptp(shares) > 0.05
    pooled = budgets.pool(dense(MODEL), 0.5, HOW)
    left = np.stack([np.asarray(cache.count(kv)).mean(0) for kv in pooled])
    np.testing.assert_allclose(shares, left / left.mean(), atol=1e-3)
    budgets.save(found, tmp_path / "shares.json")
    assert budgets.load(tmp_path / "shares.json", MODEL) == found
    table = found.table(96, chelsea().least)
    _, state = kvjax.prefill(MODEL, PROMPTS, chelsea(budget=table), room=NEW)
    assert [kv.slots for kv in state] == [tuple(min(b, 128) for b in row) for row in table]


WINDOWED = ((0.0, 0.0), (0.7, 1.3))


@given(
    st.lists(st.floats(0.05, 6.0), min_size=12, max_size=12).map(lambda x: np.round(x, 4).reshape(4, 3)),
    st.integers(64, 6000),
)
def test_a_table_is_in_multiples_of_32_and_its_mean_is_the_budget(shares, budget):
    shares = shares / shares.mean()
    table = np.array(Shares(tuple(map(tuple, shares.tolist())), "", 0.01, 4096).table(budget, 28))
    assert table.shape == shares.shape
    assert (table % 32 == 0).all()
    assert table.min() >= 32  # 28 slots are needed
    assert budget - 32 < table.mean() <= budget
    order = np.argsort(shares.ravel(), kind="stable")
    assert (np.diff(table.ravel()[order]) >= 0).all()
    if budget > 1000:
        assert (np.abs(table - np.maximum(table.mean() * shares, 32)) < 0.5 * table.mean()).all()


def test_no_head_gets_more_slots_than_there_are_tokens():
    table = np.array(Shares(((2.5, 0.5), (0.5, 0.5)), "", 0.5, 512).table(256, 28))
    assert table.tolist() == [[512, 160], [160, 160]]


def test_windows_do_not_count_in_a_table():
    table = np.array(Shares(WINDOWED, "", 0.5, 4096).table(320, 28))
    assert table[1].tolist() == [224, 416]
    assert (table[0] >= 28).all()


@pytest.mark.parametrize(("needed", "least"), [(28, 32), (32, 32), (33, 64)])
def test_a_table_below_what_heads_need_raises(needed, least):
    shares = Shares(((1.0, 1.0),), "", 0.5, 4096)
    assert shares.table(least, needed) == ((least, least),)
    with pytest.raises(ValueError, match=f"{least} slots in multiples of 32, got budget={least - 1}"):
        shares.table(least - 1, needed)


def saved(path, model=MODEL, **changes):
    shares = {
        "shares": [[1.0, 0.8], [1.2, 1.0]],
        "model": fingerprint(model),
        "keep": 0.5,
        "context": 90,
    }
    path.write_text(json.dumps(shares | changes), encoding="utf-8")
    return path


def test_shares_of_another_model_raise(tmp_path):
    assert budgets.load(saved(tmp_path / "x"), MODEL).shares == ((1.0, 0.8), (1.2, 1.0))
    with pytest.raises(ValueError, match=r"got those of another in .*x', .*: calibrate tiny"):
        budgets.load(saved(tmp_path / "x", tiny(4)), MODEL)
    with pytest.raises(ValueError, match=r"which are \(1, 2\) for \(2, 2\)"):
        budgets.load(saved(tmp_path / "x", shares=[[1.0, 1.0]]), MODEL)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"{}", b'"text"', b"null",
        b'{"shares": 1, "model": "", "keep": 0.5, "context": 9}',
        b'{"shares": [["a", 1], [1, 1]], "model": "", "keep": 0.5, "context": 9}',
        b'{"shares": [[1, 1], [1]], "model": "", "keep": 0.5, "context": 9}',
        b'{"shares": [[1, 1], [1, 1]], "model": "", "keep": 0.5, "context": null}',
    ],
)  # fmt: skip
def test_damaged_files_of_shares_raise(tmp_path, text):
    (tmp_path / "shares").write_bytes(text)
    with pytest.raises(
        ValueError, match=r"budgets are a file of `kvjax calibrate budgets`, got .*: make it anew"
    ):
        budgets.load(tmp_path / "shares", MODEL)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_shares_that_are_no_shares_raise(tmp_path, bad):
    with pytest.raises(
        ValueError, match=r"budgets are a file of `kvjax calibrate budgets`, got .*: make it anew"
    ):
        budgets.load(saved(tmp_path / "shares", shares=[[1.0, bad], [1.0, 1.0]]), MODEL)


def test_a_missing_file_of_shares_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        budgets.load(tmp_path / "none", MODEL)


def test_a_fingerprint_is_of_the_weights_and_not_of_their_type():
    name = fingerprint(MODEL)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL.params)
    assert fingerprint(dataclasses.replace(MODEL, params=half, dtype=jnp.bfloat16)) == name
    assert fingerprint(dataclasses.replace(MODEL, name="other")) == name
    other = dataclasses.replace(MODEL, params=jax.tree.map(lambda x: x * 1.05, MODEL.params))
    assert fingerprint(other) != name
    deeper = dataclasses.replace(MODEL.config, rope=kvjax.models.config.RopeConfig(base=5e5))
    assert fingerprint(dataclasses.replace(MODEL, config=deeper)) != name


@pytest.mark.parametrize(
    ("first", "row"), [(1.0, (100, 100, 100)), (1.5, (150, 100, 50)), (0.5, (50, 100, 150))]
)
def test_a_schedule_is_a_line_whose_mean_is_the_budget(first, row):
    assert budgets.schedule(100, 3, first) == row


@pytest.mark.parametrize("first", [0.0, 2.0, -1.0])
def test_a_schedule_that_leaves_a_layer_without_budget_raises(first):
    with pytest.raises(ValueError, match="every layer gets a budget"):
        budgets.schedule(100, 3, first)


def test_a_budget_per_layer_is_each_layers_budget():
    model = MODELS["G2"]
    method = Chelsea(budgets.schedule(60, 2, 1.2), chunk=16, n_recent=8, slack=4)
    _, state = kvjax.prefill(model, PROMPTS, method, room=8)
    assert [kv.slots for kv in state] == [(72, 72), (48, 48)]


def test_documents_are_from_all_texts(tmp_path):
    tokenizer, paths = byte_tokenizer(), []
    for letter in "ab":
        paths.append(str(tmp_path / letter))
        (tmp_path / letter).write_text(letter * 300)
    found = text.documents(tokenizer, paths, 3, 50, 0)
    assert [tokenizer.decode(row.tolist())[0] for row in found] == ["a", "a", "b"]
    with pytest.raises(ValueError, match="each text gives a document"):
        text.documents(tokenizer, paths, 1, 50, 0)
