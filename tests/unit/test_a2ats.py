"""A²ATS against its equations in NumPy float64, and where it must equal dense attention."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import MODELS, NEW, PROMPTS, codebooks, run

import kvjax
from kvjax import cache, replay
from kvjax.methods.a2ats import A2ATS
from kvjax.rope import frequencies

MODEL = MODELS["G2"]
BOOKS = codebooks(MODEL)
TOTAL = 128 + NEW  # the prompt is padded to a power of two


def a2ats(topk, **settings) -> A2ATS:
    return A2ATS(topk, **({"calibration": BOOKS, "window": 6, "n_sinks": 3, "far": 64} | settings))


def turned(x: np.ndarray, t: np.ndarray, rope) -> np.ndarray:
    """Rotates the last axis by t tokens, in float64."""
    inv, _ = frequencies(rope, x.shape[-1])
    angle = np.asarray(t, np.float64)[..., None] * inv
    a, b = np.split(x.astype(np.float64), 2, -1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def wanted(q, keys, method, layer, seen, rope) -> list[set[int]]:
    """The tokens that each KV head reads, from the equations; q [K G D], keys [K T D] before rotation."""
    chosen, books, topk = [], method.calibration, method.topk
    for head, (group, k) in enumerate(zip(q, keys, strict=True)):
        a, c = (np.asarray(x[layer, head], np.float64) for x in (books.metric, books.centroids))
        code = ((k.astype(np.float64) @ a)[:, None] - c[None]) ** 2
        word = (c @ np.linalg.inv(a))[code.sum(-1).argmin(-1)]  # back in the frame of keys
        always = {*range(min(method.n_sinks, seen)), *range(max(seen - method.window, 0), seen)}
        read = set(always)
        for row in group:
            score = word @ turned(row, method.far, rope)
            rest = [t for t in np.argsort(-score, kind="stable") if t not in always]
            read |= set(rest[: topk if isinstance(topk, int) else max(1, int(topk * seen))])
        chosen.append(read)
    return chosen


@pytest.mark.parametrize("topk", [1, 7, 0.1, 1.0])
@pytest.mark.parametrize("name", ["G2", "G1 with a window"])
def test_reads_what_the_equations_say(topk, name):
    model = MODELS[name]
    method = a2ats(topk, calibration=codebooks(model))
    ids = [PROMPTS[0].tolist(), PROMPTS[1, :37].tolist()]
    _, pos, records = replay.record(model, ids, room=NEW)
    state = replay.replay(model, method, records, pos, room=NEW)
    index = 1  # the last layer has no window in either model
    kv, record = state[index], records[index]
    one = method.for_layer(index, 2)
    q, at = record.q[:, -1:], pos[:, -1:]
    chosen = np.asarray(one.select(kv, q, at).idx)
    for b, row in enumerate(ids):
        keys = np.swapaxes(np.asarray(record.k[b, -len(row) :]), 0, 1)
        sets = wanted(np.asarray(q[b, 0]), keys, method, index, len(row), model.config.rope)
        for head, expected in enumerate(sets):
            got = [i for i in chosen[b, head].tolist() if i >= 0]
            assert got == sorted(expected)


def test_far_scores_do_not_depend_on_the_position():
    """The same query chooses the same tokens wherever it stands, but for the newest ones."""
    kv = filled(60)
    q = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 2, 2, 16)), jnp.float32)
    method = a2ats(5).for_layer(0, 2)
    first = method.select(kv, q, jnp.asarray([[59]])).idx
    np.testing.assert_array_equal(first, method.select(kv, q, jnp.asarray([[400]])).idx)


def filled(n: int, method: A2ATS | None = None) -> cache.KV:
    """The first layer's state of n random tokens."""
    method, rng = method or a2ats(5), np.random.default_rng(0)
    layer = cache.Layer.of(MODEL.config, 0)
    k, v = (jnp.asarray(rng.normal(size=(1, n, 2, 16)), jnp.float32) for _ in range(2))
    own = method.for_layer(0, 2)
    pos = jnp.arange(n)[None]
    kv, idx = cache.append(own.init(layer, 1, (60, 60), jnp.float32), k, v, pos)
    return own.observe(kv, jnp.zeros((1, n, 2, 2, 16)), k, pos, idx)


@pytest.mark.parametrize("topk", [TOTAL, 1.0])
def test_reading_all_is_dense_attention(topk):
    dense, _ = run(MODEL, kvjax.METHODS["full"]())
    ours, _ = run(MODEL, a2ats(topk))
    np.testing.assert_allclose(ours, dense, atol=2e-4)


@settings(max_examples=6)  # each compiles
@given(*(st.sampled_from(x) for x in ((1, 7, 40), (1, 9, 60), (1, 6, 20), (0, 3, 9))))
def test_reads_each_token_once_and_always_the_newest_and_the_first(topk, n, window, n_sinks):
    method = a2ats(topk, window=window, n_sinks=n_sinks)
    kv = filled(n, method)
    q = jnp.asarray(np.random.default_rng(n).normal(size=(1, 1, 2, 2, 16)), jnp.float32)
    for row in np.asarray(method.for_layer(0, 2).select(kv, q, jnp.asarray([[n - 1]])).idx)[0]:
        read = [i for i in row.tolist() if i >= 0]
        always = {*range(min(n_sinks, n)), *range(max(n - window, 0), n)}
        assert len(set(read)) == len(read)
        assert set(read) >= always
        assert max(read) < n
        assert min(n, len(always) + topk) <= len(read) <= min(n, len(always) + 2 * topk)


def test_codes_made_anew_are_those_made_on_the_way():
    kv = filled(40)
    again = a2ats(5).for_layer(0, 2).moved(kv, None)
    assert (np.asarray(again.aux.codes) == np.asarray(kv.aux.codes)).mean() > 0.97  # keys are un-rotated


@settings(max_examples=4)  # each compiles
@given(
    st.lists(st.integers(1, 13), min_size=1, max_size=6),
    st.sampled_from((1, 6, 20)),
    st.sampled_from((0, 3, 9)),
)
def test_an_index_that_grew_is_the_one_made_anew(chunks, window, n_sinks):
    """Tokens come in chunks of any length, one of two rows half as many: counts, marks and window agree."""
    method, rng = a2ats(5, window=window, n_sinks=n_sinks).for_layer(0, 2), np.random.default_rng(sum(chunks))
    kv, start = method.init(cache.Layer.of(MODEL.config, 0), 2, (60, 60), jnp.float32), np.zeros(2, int)
    for n in chunks:
        k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 16)), jnp.float32) for _ in range(2))
        length = np.array([n, n // 2])
        at = np.arange(n) - (n - length)[:, None]  # padding comes first
        pos = jnp.asarray(np.where(at >= 0, start[:, None] + at, -1), jnp.int32)
        start = np.minimum(start + length, 60)
        if start.max() == 60:
            break
        kv, idx = cache.append(kv, k, v, pos)
        kv = method.observe(kv, jnp.zeros((2, n, 2, 2, 16)), k, pos, idx)
    again = method.moved(kv, jnp.broadcast_to(jnp.arange(120), (2, 120))).aux
    for name in ("codes", "counts", "recent"):
        np.testing.assert_array_equal(getattr(kv.aux, name), getattr(again, name), err_msg=name)
    ranked = np.asarray(kv.aux.codes >= 0).reshape(2, 2, 60).sum(-1)
    np.testing.assert_array_equal(ranked, np.asarray(kv.aux.counts).sum(-1))
    seen = np.asarray(kv.seen)
    always = [len({*range(min(n_sinks, n)), *range(max(n - window, 0), n)}) for n in seen]
    np.testing.assert_array_equal(ranked, np.repeat((seen - always)[:, None], 2, axis=1))


def test_a_flat_layer_reads_everything_and_has_no_index():
    flat = dataclasses.replace(BOOKS, flat=(True, False))
    _, state = run(MODEL, a2ats(5, calibration=flat))
    assert state[0].aux is None
    assert state[1].aux is not None
    method = a2ats(5, calibration=flat).for_layer(0, 2)
    assert method.select(state[0], jnp.zeros((2, 1, 2, 2, 16)), jnp.zeros((2, 1), jnp.int32)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 0}, "topk is tokens, 1 or more"),
        ({"topk": 0.0}, "topk is tokens"),
        ({"topk": 1.5}, "topk is tokens"),
        ({"topk": 5, "window": 0}, "window is at least 1"),
        ({"topk": 5, "n_sinks": -1}, "n_sinks at least 0"),
        ({"topk": 5, "far": 2048}, "codebooks are made for one distance"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        a2ats(**settings)


def test_codebooks_of_another_model_are_refused():
    with pytest.raises(ValueError, match="each layer has codebooks"):
        kvjax.prefill(MODEL, PROMPTS, a2ats(5, calibration=BOOKS.layer(0)), room=NEW)
    wide = dataclasses.replace(BOOKS, centroids=BOOKS.centroids[..., :8], metric=BOOKS.metric[..., :8, :8])
    with pytest.raises(ValueError, match=r"codebooks are \[K C D\] with the model's K and D"):
        kvjax.prefill(MODEL, PROMPTS, a2ats(5, calibration=wide), room=NEW)


def test_a_topk_above_the_length_is_refused():
    with pytest.raises(ValueError, match=f"topk is at most the slots of a head, {TOTAL}, got self.topk=141"):
        kvjax.prefill(MODEL, PROMPTS, a2ats(TOTAL + 1), room=NEW)


def test_layers_and_calibrations_share_programs():
    first, second = (a2ats(5, calibration=codebooks(MODEL, seed)) for seed in (0, 1))
    assert first == second
    assert hash(first) == hash(second)
    one, _ = run(MODEL, first)
    other, _ = run(MODEL, second)
    assert np.abs(one - other).max() > 1e-3  # equal programs, each with its own codebooks
