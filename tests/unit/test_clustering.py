"""Clustering against loops in float64, and the properties of the paper."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvjax
from kvjax import cache, clustering, rope
from kvjax.attend import attend
from kvjax.cache import Layer
from kvjax.clustering import Matching
from kvjax.models.config import RopeConfig

D = 16
LAYER = Layer(n_kv_heads=2, group=2, head_dim=D, rope=RopeConfig(base=1e4), scale=0.25)
HOW = Matching(chunk=16, stride=2, similarity="cosine", before_rope=True, n_sinks=2, n_recent=3)
EVERY = dataclasses.replace(HOW, n_sinks=0, n_recent=0)
STORED = dataclasses.replace(EVERY, before_rope=False)
LENGTH, SLOTS, LEAST = 40, 45, 8  # of the random cases: tokens of a whole row, capacity and lowest target


def state(length, batch=1, seed=0, room=0, layer=LAYER, k=None):
    """A state that has read `length` random tokens, whose neighbours resemble each other."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, layer.n_kv_heads, D)
    k = np.cumsum(rng.normal(size=shape), axis=1) * 0.3 + rng.normal(size=shape) if k is None else k
    kv = cache.allocate(layer, batch, [length + room] * layer.n_kv_heads, jnp.float32)
    pos = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return cache.append(
        kv, jnp.asarray(k, jnp.float32), jnp.asarray(rng.normal(size=shape), jnp.float32), pos
    )[0]


def by_loops(k, v, seen, targets, how):
    """One head's tokens, pair by pair, in float64: clusters as lists of tokens. Returns k, v, pos, n."""

    def turn(x, p, sign):
        freqs, _ = rope.frequencies(LAYER.rope, D)
        angle = sign * p * np.asarray(freqs, np.float64)
        a, b = x[: D // 2], x[D // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    def alike(x, y):
        if how.similarity == "cosine":
            return x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        return x @ y if how.similarity == "dot" else -((x - y) ** 2).sum()

    plain = np.stack([turn(x, p, -1) for p, x in enumerate(k)]) if how.before_rope else k
    clusters = [[i] for i in range(len(k))]
    for target in targets:
        mean = [plain[c].mean(0) for c in clusters]
        free = [c[0] >= how.n_sinks and c[0] < seen - how.n_recent for c in clusters]
        pairs = []
        for a in range(len(clusters)):
            start = a // how.chunk * how.chunk
            among = [
                b for b in range(start, min(start + how.chunk, len(clusters)))
                if (b - start) % how.stride == how.stride - 1 and free[b]
            ]  # fmt: skip
            if free[a] and (a - start) % how.stride != how.stride - 1 and among:
                scores = [alike(mean[a], mean[b]) for b in among]
                pairs.append((-max(scores), a, among[int(np.argmax(scores))]))
        go = sorted(pairs)[: max(len(clusters) - target, 0)]
        joined = {b: clusters[b] + [t for _, a, to in go if to == b for t in clusters[a]] for _, _, b in go}
        gone = {a for _, a, _ in go}
        clusters = [joined.get(i, c) for i, c in enumerate(clusters) if i not in gone]
    pos = np.array([round(np.mean(c)) for c in clusters])
    keys = np.stack([plain[c].mean(0) for c in clusters])
    if how.before_rope:
        keys = np.stack([turn(x, p, 1) for x, p in zip(keys, pos, strict=True)])
    return (
        keys,
        np.stack([v[c].mean(0) for c in clusters]),
        pos,
        np.array([len(c) for c in clusters]),
    )


@pytest.mark.parametrize("kind", ["cosine", "l2", "dot"])
@pytest.mark.parametrize("before_rope", [True, False])
@pytest.mark.parametrize("stride", [2, 3])
def test_passes_are_the_formula_pair_by_pair(kind, before_rope, stride):
    length, goal = 50, [12, 30]
    how = dataclasses.replace(HOW, similarity=kind, before_rope=before_rope, stride=stride)
    kv = state(length)
    out, n = clustering.reduce(kv, kv.mass, goal, jnp.ones((1, 2), bool), how, 4, (20, 30))
    for h, (first, size) in enumerate([(0, 20), (20, 30)]):
        k, v = (np.asarray(x[0], np.float64).reshape(2, length, D)[h] for x in (kv.k, kv.v))
        ratio = (goal[h] / length) ** (1 / 4)
        targets = [*(int(np.ceil(length * ratio**i - 1e-3)) for i in (1, 2, 3)), goal[h]]
        wanted = by_loops(k, v, length, targets, how)
        rows = slice(first, first + len(wanted[0]))
        assert int(out.fill[0, h]) == len(wanted[0]) <= size
        np.testing.assert_array_equal(np.asarray(out.pos[0, rows]), wanted[2])
        np.testing.assert_array_equal(np.asarray(out.mass[0, rows]), wanted[3])
        np.testing.assert_array_equal(np.asarray(n[0, rows]), wanted[3])
        np.testing.assert_allclose(np.asarray(out.k[0, rows]), wanted[0], atol=2e-5)
        np.testing.assert_allclose(np.asarray(out.v[0, rows]), wanted[1], atol=2e-5)


@functools.partial(jax.jit, static_argnames=("goal", "how", "rounds", "slots"))
def reduced(kv, full, *, goal, how, rounds=None, slots=None):
    """`reduce`, compiled once for all values."""
    return clustering.reduce(kv, kv.mass, goal, full, how, rounds, slots or kv.slots)


@jax.jit
def unrolled(kv, full):
    """`reduce` to one goal, as long heads have it."""
    with mock.patch.object(clustering, "_LONG", 0):
        return clustering.reduce(kv, kv.mass, (12, 12), full, HOW, None, (40, 40))


@jax.jit
def passes(kv, targets):
    """Runs a pass per row of targets [N B K]; returns the clusters, and the state that they make."""
    clusters = clustering.begin(kv, kv.mass, HOW)
    for target in targets:
        clusters = clustering.merge(clusters, target, kv.slots, [LEAST] * 2, HOW)
    return clusters, clustering.finish(kv, kv.mass, clusters, [LEAST] * 2, kv.slots, HOW)[0]


def two_rows(seed, lengths=(LENGTH, 23)):
    """A state of two rows that have read tokens enough, and not many, with free slots after them."""
    rng = np.random.default_rng(seed)
    shape = (2, LENGTH, 2, D)
    k = np.cumsum(rng.normal(size=shape), axis=1) * 0.3 + rng.normal(size=shape)
    pos = np.stack([np.concatenate([np.full(LENGTH - n, -1), np.arange(n)]) for n in lengths])
    kv = cache.allocate(LAYER, 2, (SLOTS, SLOTS), jnp.float32)
    k, v = (jnp.asarray(x, jnp.float32) for x in (k, rng.normal(size=shape)))
    return append(kv, k, v, jnp.asarray(pos, jnp.int32))[0]


append = jax.jit(cache.append)


def heads(kv):
    """Yields the row, the head, and what its slots hold: k, v, pos and mass."""
    for b in range(len(kv.mass)):
        for h, (first, size) in enumerate(zip(cache.starts(kv.slots), kv.slots, strict=True)):
            at = slice(first, first + size)
            yield b, h, *(np.asarray(x[b, at]) for x in (kv.k, kv.v, kv.pos, kv.mass))


def equal(ours, theirs):
    """Asserts that two states are equal bit for bit."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


seeds = st.integers(0, 10**6)
targets = st.lists(st.integers(LEAST, LENGTH), min_size=8, max_size=8).map(
    lambda x: np.array(x, np.int32).reshape(2, 2, 2)
)


def token_merging(metric, x, size, r):
    """Bipartite soft matching as published, in float64; tokens come back in order of time."""
    metric = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    scores = metric[::2] @ metric[1::2].T
    node_max, node_idx = scores.max(-1), scores.argmax(-1)
    edge_idx = np.argsort(-node_max)
    unm_idx, src_idx = edge_idx[r:], edge_idx[:r]
    dst_idx = node_idx[src_idx]

    def merge(x):
        src, dst = x[::2], x[1::2].copy()
        np.add.at(dst, dst_idx, src[src_idx])
        return np.concatenate([src[unm_idx], dst])

    order = np.argsort(np.concatenate([2 * unm_idx, 2 * np.arange(len(x) // 2) + 1]))
    size = size[:, None]
    return (merge(x * size) / merge(size))[order], merge(size)[order, 0]


@pytest.mark.parametrize("goal", [(31, 25), (16, 29)])
def test_one_chunk_with_stride_2_is_token_merging(goal):
    length = 32
    how = dataclasses.replace(STORED, chunk=length)
    kv = state(length)
    mass = np.random.default_rng(1).integers(1, 5, (1, 2 * length)).astype(np.float32)
    kv = kv.replace(mass=jnp.asarray(mass), seen=jnp.asarray([int(mass.sum())]))
    out, n = reduced(kv, jnp.ones((1, 2), bool), goal=goal, how=how, rounds=1)
    assert out.fill.tolist() == [list(goal)]
    for h, left in enumerate(goal):
        before, after = slice(h * length, (h + 1) * length), slice(h * length, h * length + left)
        k, v, size = (np.asarray(x[0, before], np.float64) for x in (kv.k, kv.v, kv.mass))
        for x, ours in ((k, out.k), (v, out.v)):
            theirs, sizes = token_merging(k, x, size, length - left)
            np.testing.assert_allclose(np.asarray(ours[0, after]), theirs, atol=2e-5)
        np.testing.assert_array_equal(np.asarray(out.mass[0, after]), sizes)
        np.testing.assert_array_equal(np.asarray(n[0, after]), sizes)


@pytest.mark.parametrize("n_queries", [1, 3])
def test_merging_equal_tokens_leaves_attention_as_it_is_with_log_n_alone(n_queries):
    length = 32
    kv = state(length)
    same = np.arange(2 * length) // 4 * 4  # tokens 0, 1, 2 of every four are equal, and the last another
    same = np.where(np.arange(2 * length) % 4 == 3, np.arange(2 * length), same)
    kv = kv.replace(k=kv.k[:, same], v=kv.v[:, same])
    out, _ = reduced(kv, jnp.ones((1, 2), bool), goal=(16, 16), how=STORED, rounds=1)
    assert sorted(set(out.mass[0, :16].tolist())) == [1, 3]
    q = jnp.asarray(np.random.default_rng(2).normal(size=(1, n_queries, 2, 2, D)), jnp.float32)
    pos = jnp.arange(length, length + n_queries)[None]
    before, after = (np.asarray(attend(x, q, pos)) for x in (kv, out))
    np.testing.assert_allclose(after, before, atol=1e-5)
    without = np.asarray(attend(out.replace(mass=jnp.minimum(out.mass, 1.0)), q, pos))
    assert (np.abs(without - before).max(-1) > 0.02).all()


@given(seeds, targets)
def test_masses_and_weighted_values_keep_their_sums(seed, targets):
    kv = two_rows(seed)
    _, out = passes(kv, targets)
    assert (np.asarray(out.fill) < np.asarray(kv.fill)).any() or (targets >= np.asarray(kv.fill)).all()
    for (b, _, _, v, _, mass), (_, _, _, old, _, was) in zip(heads(out), heads(kv), strict=True):
        assert mass.sum() == kv.seen[b]
        np.testing.assert_allclose(mass @ v, was @ old, atol=1e-4)


@given(seeds, targets)
def test_a_pass_leaves_its_target_or_what_cannot_merge(seed, targets):
    kv = two_rows(seed)
    _, out = passes(kv, targets)
    for b, h, *_ in heads(kv):
        low = high = int(kv.fill[b, h])
        for target in targets[:, b, h]:
            low = min(low, int(target))
            free = high - HOW.n_sinks - HOW.n_recent  # half may merge, but for a source at either cut chunk
            high = max(min(int(target), high), high - max(free // 2 - 2, 0))
        assert low <= out.fill[b, h] <= high


@given(seeds)
def test_nothing_to_merge_changes_nothing(seed):
    kv = two_rows(seed)
    equal(passes(kv, np.broadcast_to(np.asarray(kv.fill), (2, 2, 2)))[1], kv)
    equal(passes(kv, np.full((2, 2, 2), LENGTH, np.int32))[1], kv)
    out, n = reduced(kv, jnp.zeros((2, 2), bool), goal=(20, 12), how=HOW)
    equal((out, n), (kv, kv.mass))


@given(seeds, targets)
def test_survivors_stand_in_the_order_of_time_without_gaps(seed, targets):
    kv = two_rows(seed)
    clusters, out = passes(kv, targets)
    roots = np.asarray(clusters.root).reshape(2, 2, SLOTS)
    for b, h, _, _, pos, mass in heads(out):
        n = int(out.fill[b, h])
        assert ((mass > 0) == (np.arange(SLOTS) < n)).all()
        assert (np.diff(roots[b, h, :n]) > 0).all()  # where each cluster's destination stood
        assert (roots[b, h, n:] == -1).all()
        assert (np.diff(pos[:n][mass[:n] == 1]) > 0).all()
    np.testing.assert_array_equal(np.asarray(out.fill), np.asarray(cache.count(out)))


@given(seeds, targets)
def test_sinks_and_recent_tokens_stay(seed, targets):
    kv = two_rows(seed)
    _, out = passes(kv, targets)
    for (b, h, *new), (_, _, *old) in zip(heads(out), heads(kv), strict=True):
        n, was = int(out.fill[b, h]), int(kv.fill[b, h])
        for x, y in zip(new, old, strict=True):
            np.testing.assert_array_equal(x[: HOW.n_sinks], y[: HOW.n_sinks])
            np.testing.assert_array_equal(x[n - HOW.n_recent : n], y[was - HOW.n_recent : was])


@given(seeds, targets)
def test_a_slot_that_does_not_merge_keeps_its_bits(seed, targets):
    kv = two_rows(seed)
    _, out = passes(kv, targets)
    for (b, h, k, v, pos, mass), (_, _, key, value, *_) in zip(heads(out), heads(kv), strict=True):
        single = mass == 1
        merged = kv.seen[b] - single.sum()
        assert (merged > 0) == (out.fill[b, h] < kv.fill[b, h])
        np.testing.assert_array_equal(k[single], key[pos[single]])
        np.testing.assert_array_equal(v[single], value[pos[single]])


def test_a_state_in_bfloat16_stays_so():
    kv = two_rows(0)
    kv = kv.replace(k=kv.k.astype(jnp.bfloat16), v=kv.v.astype(jnp.bfloat16))
    out, _ = reduced(kv, jnp.ones((2, 2), bool), goal=(12, 12), how=HOW)
    assert out.k.dtype == out.v.dtype == jnp.bfloat16
    for (_, _, k, _, pos, mass), (_, _, key, *_) in zip(heads(out), heads(kv), strict=True):
        np.testing.assert_array_equal(k[mass == 1], key[pos[mass == 1]])
        assert (mass > 1).any()


@given(seeds, st.integers(HOW.n_sinks, LENGTH - HOW.n_recent - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_key_that_is_not_finite_stays_and_spoils_nothing(seed, at, bad):
    kv = two_rows(seed)
    spoilt = kv.replace(k=kv.k.at[0, SLOTS + at, 3].set(bad))
    low = np.full((2, 2, 2), 20, np.int32)
    (_, clean), (_, out) = passes(kv, low), passes(spoilt, low)
    for (b, h, k, v, pos, mass), (_, _, *old) in zip(heads(out), heads(clean), strict=True):
        if (b, h) != (0, 1):
            for x, y in zip((k, v, pos, mass), old, strict=True):
                np.testing.assert_array_equal(x, y)
            continue
        whole = np.isfinite(k).all(-1)
        (slot,) = np.flatnonzero(~whole)
        assert pos[slot] == at
        assert mass[slot] == 1
        np.testing.assert_array_equal(k[slot], np.asarray(spoilt.k[0, SLOTS + at]))
        assert mass.sum() == LENGTH
        assert out.fill[b, h] == 20


def test_where_nothing_can_merge_the_oldest_go_and_the_sinks_stay():
    kv = two_rows(0, (LENGTH, LENGTH))
    spoilt = kv.replace(k=kv.k.at[:, SLOTS:].set(jnp.nan))
    out, _ = reduced(spoilt, jnp.ones((2, 2), bool), goal=(12, 12), how=HOW, slots=(20, 20))
    for b, h, _, _, pos, mass in heads(out):
        if h == 1:
            assert pos.tolist() == [0, 1, *range(LENGTH - 18, LENGTH)]
            assert (mass == 1).all()
        else:
            assert (out.fill[b, h], mass.sum()) == (12, LENGTH)


def test_keys_that_are_not_finite_raise_under_debug():
    kv = two_rows(0)
    run = kvjax.debug(lambda kv: reduced(kv, jnp.ones((2, 2), bool), goal=(12, 12), how=HOW))
    run(kv)
    run(kv.replace(k=kv.k.at[:, LENGTH:SLOTS].set(jnp.nan)))  # empty slots may hold anything
    with pytest.raises(ValueError, match="finite"):
        run(kv.replace(k=kv.k.at[0, 9, 0].set(jnp.nan)))


@pytest.mark.parametrize("key", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["cosine", "l2", "dot"])
def test_keys_that_are_all_equal_merge(key, kind):
    kv = state(50, k=np.full((1, 50, 2, D), key))
    how = dataclasses.replace(HOW, similarity=kind)
    out, _ = reduced(kv, jnp.ones((1, 2), bool), goal=(12, 20), how=how)
    assert out.fill.tolist() == [[12, 20]]
    for _, _, k, v, pos, mass in heads(out):
        assert np.isfinite(k).all()
        assert np.isfinite(v).all()
        assert mass.sum() == 50
        assert mass[:2].tolist() == [1, 1]
        plain = rope.rotate_rows(jnp.asarray(k)[None], jnp.asarray(pos)[None], LAYER.rope, back=True)[0]
        np.testing.assert_allclose(np.asarray(plain)[mass > 0], key, atol=1e-5)


@given(seeds, targets)
def test_heads_fare_alike_wherever_they_stand(seed, targets):
    kv = two_rows(seed)
    swap = np.r_[SLOTS : 2 * SLOTS, :SLOTS]

    def swapped(kv):
        packed = {name: getattr(kv, name)[:, swap] for name in ("k", "v", "pos", "mass")}
        return kv.replace(fill=kv.fill[:, ::-1], **packed)

    _, out = passes(kv, targets)
    equal(passes(swapped(kv), targets[:, :, ::-1])[1], swapped(out))


def test_heads_of_unequal_capacity_fare_alike_wherever_they_stand():
    kv = two_rows(3, (LENGTH, LENGTH))
    turn = np.r_[SLOTS : 2 * SLOTS, :SLOTS]
    other = kv.replace(**{name: getattr(kv, name)[:, turn] for name in ("k", "v", "pos", "mass")})
    full = jnp.ones((2, 2), bool)
    out, _ = reduced(kv, full, goal=(12, 30), how=HOW, rounds=4, slots=(20, 33))
    turned, _ = reduced(other, full, goal=(30, 12), how=HOW, rounds=4, slots=(33, 20))
    assert out.fill.tolist() == [[12, 30]] * 2
    for (_, _, *ours), b, h in zip(heads(out), [0, 0, 1, 1], [1, 0, 1, 0], strict=True):
        theirs = next(x for r, i, *x in heads(turned) if (r, i) == (b, h))
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


@given(seeds, targets)
def test_rows_fare_alike_whatever_stands_beside(seed, targets):
    kv = two_rows(seed)
    _, out = passes(kv, targets)
    equal(
        passes(jax.tree.map(lambda x: x[::-1], kv), targets[:, ::-1])[1], jax.tree.map(lambda x: x[::-1], out)
    )
    other = jax.tree.map(lambda x, y: jnp.stack([x[0], y[1]]), kv, two_rows(seed + 1, (LENGTH, 11)))
    _, beside = passes(other, targets)
    equal(jax.tree.map(lambda x: x[0], beside), jax.tree.map(lambda x: x[0], out))


@given(seeds)
def test_heads_of_one_goal_are_looked_at_less_and_less_and_fare_the_same(seed):
    kv, full = two_rows(seed, (LENGTH, 33)), jnp.asarray([[True, True], [True, False]])
    ours, _ = unrolled(kv, full)
    theirs, _ = reduced(kv, full, goal=(12, 30), how=HOW, slots=(40, 40))
    first = [x for x in heads(ours) if x[1] == 0], [x for x in heads(theirs) if x[1] == 0]
    for (_, _, *new), (_, _, *old) in zip(*first, strict=True):
        for x, y in zip(new, old, strict=True):
            np.testing.assert_array_equal(x, y)
    assert ours.fill.tolist() == [[12, 12], [12, 33]]


@given(seeds, st.lists(st.booleans(), min_size=4, max_size=4))
def test_only_full_heads_merge(seed, full):
    kv = two_rows(seed, (LENGTH, LENGTH))
    out, _ = reduced(kv, jnp.asarray(full).reshape(2, 2), goal=(20, 12), how=HOW)
    for is_full, goal, (b, h, *new), (_, _, *old) in zip(
        full, (20, 12) * 2, heads(out), heads(kv), strict=True
    ):
        if is_full:
            assert out.fill[b, h] == goal
        else:
            for x, y in zip(new, old, strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("stride", "chunk", "goal"), [(2, 16, 12), (3, 17, 14), (5, 17, 16), (5, 48, 29)])
def test_passes_leave_what_the_plan_says(stride, chunk, goal):
    how = dataclasses.replace(HOW, stride=stride, chunk=chunk)
    plan = clustering.plan(50, goal, how)
    assert plan[-1] == goal
    assert all(b < a for a, b in zip([50, *plan[:-1]], plan, strict=True))
    out, _ = reduced(state(50, seed=stride), jnp.ones((1, 2), bool), goal=(goal, goal), how=how)
    assert out.fill.tolist() == [[goal, goal]]
    assert clustering.plan(50, 6, how)[-1] > 6  # the sinks, the recent, and one that is left of the rest


def test_a_plan_in_few_rounds_says_what_it_reaches():
    assert clustering.plan(200, 20, HOW, 1) == [105]  # of 195 free slots 97 are sources, and 2 may find none
    assert clustering.plan(200, 20, HOW, 8)[-1] == 20
    assert clustering.plan(200, 200, HOW) == []
