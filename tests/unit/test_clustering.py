"""Clustering against loops in float64, and the properties of the paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import attend, cache, clustering, rope
from kvjax.cache import Layer
from kvjax.clustering import Matching
from kvjax.models.config import RopeConfig

D = 16
LAYER = Layer(n_kv_heads=2, group=2, head_dim=D, rope=RopeConfig(base=1e4), scale=0.25)
HOW = Matching(chunk=16, stride=2, similarity="cosine", before_rope=True, n_sinks=2, n_recent=3)
EVERY = dataclasses.replace(HOW, n_sinks=0, n_recent=0)


def state(length, batch=1, seed=0, room=0, layer=LAYER, k=None):
    """A state that has read `length` random tokens, whose neighbours resemble each other."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, layer.n_kv_heads, D)
    k = np.cumsum(rng.normal(size=shape), axis=1) * 0.3 + rng.normal(size=shape) if k is None else k
    kv = cache.allocate(layer, batch, [length + room] * layer.n_kv_heads, jnp.float32)
    pos = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return cache.append(kv, jnp.asarray(k, jnp.float32), jnp.asarray(rng.normal(size=shape), jnp.float32), pos)[0]


def one_pass(k, v, pos, n, seen, target, how, rope_config):
    """One head, slot by slot, in float64: what the formula of `kvjax.clustering` says."""

    def turn(x, p, sign):
        freqs, _ = rope.frequencies(rope_config, D)
        angle = sign * p * np.asarray(freqs, np.float64)
        a, b = x[: D // 2], x[D // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    plain = np.stack([turn(x, p, -1) for x, p in zip(k, pos, strict=True)]) if how.before_rope else k
    free = (pos >= how.n_sinks) & (pos < seen - how.n_recent)

    def alike(x, y):
        if how.similarity == "cosine":
            return x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        return x @ y if how.similarity == "dot" else -((x - y) ** 2).sum()

    pairs = []
    for a in range(len(k)):
        chunk = range(a // how.chunk * how.chunk, min((a // how.chunk + 1) * how.chunk, len(k)))
        among = [b for b in chunk if (b - chunk[0]) % how.stride == how.stride - 1 and free[b]]
        if free[a] and (a - chunk[0]) % how.stride != how.stride - 1 and among:
            scores = [alike(plain[a], plain[b]) for b in among]
            pairs.append((-max(scores), a, among[int(np.argmax(scores))]))
    into = {b: [] for b in range(len(k))}
    for _, a, b in sorted(pairs)[: max(len(k) - target, 0)]:
        into[b].append(a)
    gone = {a for sources in into.values() for a in sources}
    out = []
    for b in range(len(k)):
        if b in gone:
            continue
        if not into[b]:
            out.append((k[b], v[b], pos[b], n[b]))
            continue
        group = [b, *into[b]]
        w = n[group] / n[group].sum()
        p = int(np.round(w @ pos[group]))
        mean = w @ plain[group]
        out.append((turn(mean, p, 1) if how.before_rope else mean, w @ v[group], p, n[group].sum()))
    return [np.asarray(x) for x in zip(*out, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(8, 50), st.integers(0, 99), st.sampled_from(["cosine", "l2", "dot"]), st.booleans(),
    st.integers(2, 4), st.integers(4, 40),
)  # fmt: skip
def test_two_passes_are_the_formula_slot_by_slot(length, seed, kind, before_rope, stride, target):
    how = dataclasses.replace(HOW, similarity=kind, before_rope=before_rope, stride=stride, chunk=12)
    kv = state(length, seed=seed)
    n = kv.mass
    wanted = [
        (np.asarray(kv.k[0], np.float64).reshape(2, length, D)[h],
         np.asarray(kv.v[0], np.float64).reshape(2, length, D)[h], np.arange(length), np.ones(length))
        for h in range(2)
    ]  # fmt: skip
    for goal in (max(target, length * 2 // 3), target):
        kv, n = clustering.merge(kv, n, jnp.full((1, 2), goal), [1, 1], kv.slots, how)
        wanted = [one_pass(*w, length, goal, how, LAYER.rope) for w in wanted]
    for h, (k, v, pos, count) in enumerate(wanted):
        rows = slice(h * length, h * length + len(k))
        np.testing.assert_array_equal(np.asarray(kv.pos[0, rows]), pos)
        np.testing.assert_array_equal(np.asarray(kv.mass[0, rows]), count)
        np.testing.assert_allclose(np.asarray(kv.k[0, rows]), k, atol=2e-5)
        np.testing.assert_allclose(np.asarray(kv.v[0, rows]), v, atol=2e-5)
        assert int(kv.fill[0, h]) == len(k)
