"""The cache's own operations: nothing is lost, nothing slides, heads keep to themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax import cache, eviction
from kvjax.cache import Layer
from kvjax.models.config import RopeConfig

LAYER = Layer(3, 1, 4, RopeConfig(), 0.5)
slots = st.sampled_from([(4, 4, 4), (1, 5, 9), (6, 2, 2)])
lengths = st.sampled_from([1, 4, 11])


def tagged(pos: np.ndarray) -> jnp.ndarray:
    """Tokens [B T 3 4] that say which position and head they are."""
    tag = np.zeros((*pos.shape, 3, 4), np.float32)
    tag[..., 0] = pos[..., None]
    tag[..., 1] = np.arange(3)
    return jnp.asarray(tag)


def held(kv) -> list[list[list[int]]]:
    """Positions in every head's occupied slots, in slot order, by row; checks that heads do not mix."""
    found = []
    for row in range(kv.pos.shape[0]):
        heads, start = [], 0
        for head, size in enumerate(kv.slots):
            at = slice(start, start + size)
            alive = np.asarray(kv.mass[row, at]) > 0
            values = np.asarray(kv.v[row, at])[alive]
            assert (values[:, 1] == head).all()
            np.testing.assert_array_equal(values[:, 0], np.asarray(kv.pos[row, at])[alive])
            heads.append(values[:, 0].astype(int).tolist())
            start += size
        found.append(heads)
    return found


def filled(sizes, n: int, lead: int = 0):
    """A state after n tokens in row 0 and none in row 1, with `lead` padding tokens before them."""
    kv = cache.allocate(LAYER, 2, sizes, jnp.float32, rotated=False)
    pos = np.full((2, lead + n), -1)
    pos[0, lead:] = np.arange(n)
    return cache.append(kv, tagged(pos), tagged(pos), jnp.asarray(pos, jnp.int32))[0]


@given(slots, lengths, st.sampled_from([0, 3]))
def test_append_fills_in_order_and_drops_what_does_not_fit(sizes, n, lead):
    kv = filled(sizes, n, lead)
    assert held(kv)[0] == [list(range(min(n, size))) for size in sizes]
    assert held(kv)[1] == [[], [], []]
    assert np.asarray(kv.seen).tolist() == [n, 0]
    assert np.asarray(kv.fill[0]).tolist() == [min(n, size) for size in sizes]


@given(slots, lengths, st.integers(0, 10**6), st.data())
def test_keep_takes_the_highest_scores_in_order_of_position(sizes, n, seed, data):
    kv = filled(sizes, n)
    score = jnp.asarray(np.random.default_rng(seed).permutation(sum(sizes)), jnp.float32)[None].repeat(2, 0)
    n_keep = [data.draw(st.sampled_from([1, 4, 9])) for _ in sizes]
    new_sizes = [data.draw(st.sampled_from([1, 4, 9])) for _ in sizes]
    new, idx = cache.keep(kv, score, n_keep, new_sizes)
    start = 0
    for head, size in enumerate(sizes):
        alive = [int(s) for s in score[0, start : start + min(n, size)]]
        n_kept = min(n_keep[head], new_sizes[head])
        best = sorted(sorted(range(len(alive)), key=lambda i: -alive[i])[:n_kept])
        assert held(new)[0][head] == best
        start += size
    carried = cache.take(kv.pos, idx)
    np.testing.assert_array_equal(
        np.where(np.asarray(new.mass) > 0, carried, 0), np.where(new.mass > 0, new.pos, 0)
    )


@given(slots, lengths, st.sampled_from([1, 3]))
def test_widen_keeps_every_token_and_makes_room(sizes, n, extra):
    kv = filled(sizes, n)
    wide, _ = cache.widen(kv, tuple(s + extra for s in sizes))
    assert held(wide)[0] == held(kv)[0]
    more = np.full((2, extra), -1)
    more[0] = 100 + np.arange(extra)
    after, _ = cache.append(wide, tagged(more), tagged(more), jnp.asarray(more, jnp.int32))
    assert held(after)[0] == [head + list(range(100, 100 + extra)) for head in held(kv)[0]]


@given(st.sampled_from([2, 5]), st.sampled_from([1, 4, 17]), st.integers(0, 10**6))
def test_eviction_by_score_frees_one_slot_and_moves_none(size, n_steps, seed):
    sizes = (size, size + 1, size)
    kv = cache.allocate(LAYER, 1, sizes, jnp.float32, rotated=False)
    rng = np.random.default_rng(seed)
    worth = rng.permutation(n_steps)
    expected = [[] for _ in sizes]
    for t in range(n_steps):
        kv, _ = cache.append(
            kv, tagged(np.array([[t]])), tagged(np.array([[t]])), jnp.array([[t]], jnp.int32)
        )
        score = jnp.asarray(worth, jnp.float32)[kv.pos]
        kv, moved = eviction.by_score(kv, score, sizes)
        assert moved is None
        for head, limit in zip(expected, sizes, strict=True):
            head.append(t)
            if len(head) == limit:
                head.remove(min(head, key=lambda i: worth[i]))
    assert [sorted(h) for h in held(kv)[0]] == expected


@given(st.sampled_from([2, 5]), st.sampled_from([1, 4, 17]), st.integers(0, 1))
def test_a_ring_holds_the_sinks_and_the_newest(size, n_steps, n_sinks):
    sizes = (size,) * 3
    kv = cache.allocate(LAYER, 1, sizes, jnp.float32, rotated=False)
    for t in range(n_steps):
        kv, _ = cache.append(
            kv, tagged(np.array([[t]])), tagged(np.array([[t]])), jnp.array([[t]], jnp.int32)
        )
        kv = eviction.wrap(kv, n_sinks)
    newest = range(max(n_steps - (size - n_sinks), n_sinks), n_steps)
    expected = sorted({*range(min(n_sinks, n_steps)), *newest})
    assert [sorted(h) for h in held(kv)[0]] == [expected] * 3


def test_runs_join_neighbours_of_equal_capacity():
    assert [(r.head, r.n, r.row, r.size) for r in cache.runs((4, 4, 7))] == [(0, 2, 0, 4), (2, 1, 8, 7)]
    assert len(cache.runs((4, 4, 4), (1, 2, 2))) == 2


@pytest.mark.parametrize("bad", [(4, 4), (4, 0, 4)])
def test_capacities_that_do_not_fit_raise(bad):
    with pytest.raises(ValueError, match="capacity of at least 1"):
        cache.allocate(LAYER, 1, bad, jnp.float32)
