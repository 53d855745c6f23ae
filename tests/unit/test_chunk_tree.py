"""The tree of chunks against its definition, and its descent against an evaluation of all leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvjax import cache
from kvjax.chunk_search import best, scores
from kvjax.chunk_tree import Shape, build, empty, refresh

SHAPES = [
    Shape(4, 8), Shape(4, 4), Shape(8, 16, pairs=2), Shape(4, None), Shape(4, 16, 2, "mean"),
    Shape(8, 24, 1, "mean"), Shape(2, 2, 2, "mean"), Shape(1, 3), Shape(4, None, 1, "middle"),
    Shape(8, 16, 2, "middle"), Shape(4, None, 1, "middle", 8), (CODES := Shape(8, None, 2, "middle", 8)),
]  # fmt: skip
SLOTS = [(40, 40), (37, 37), (16, 41), (5, 24)]
D = 6
every_shape = st.sampled_from(SHAPES)
every_slots = st.sampled_from(SLOTS)


def filled(seed: int, slots, whole: bool = False):
    """Keys, and masses of heads that are filled to some length; keys of whole numbers give exact products."""
    rng = np.random.default_rng(seed)
    shape = (2, sum(slots), D)
    keys = rng.integers(-3, 4, shape) if whole else rng.normal(size=shape)
    mass = [np.arange(s) < rng.integers(1, s + 1) for _ in range(2) for s in slots]
    return jnp.asarray(keys, jnp.float32), jnp.asarray(np.concatenate(mass).reshape(2, -1), jnp.float32)


def heads(x, slots):
    """Splits the packed axis by head."""
    return np.split(np.asarray(x), np.cumsum(slots)[:-1], axis=1)


def leaf_scores(keys, mass, q, slots, shape: Shape) -> list[np.ndarray]:
    """The score of each leaf from its definition, per head [B N]."""
    found = []
    for head, (key, alive) in enumerate(zip(heads(keys, slots), heads(mass, slots), strict=True)):
        n = -(-slots[head] // shape.leaf)
        out = np.full((len(key), n), -np.inf)
        for b in range(len(key)):
            for start in range(0, slots[head], shape.box):
                part = key[b, start : start + shape.box][alive[b, start : start + shape.box] > 0]
                if len(part) == 0:
                    continue
                query = np.asarray(q[b, head], np.float64)
                if shape.known_by != "box":
                    edges = part.min(0), part.max(0)
                    point = part.mean(0) if shape.known_by == "mean" else np.add(*edges) / 2
                    score = (query @ point).max()
                else:
                    score = np.maximum(query * part.min(0), query * part.max(0)).sum(-1).max()
                out[b, start // shape.leaf] = max(out[b, start // shape.leaf], score)
        found.append(out)
    return found


@settings(max_examples=5)
@given(every_shape, every_slots, st.integers(0, 9))
@example(CODES, SLOTS[2], 0)
def test_scores_are_their_definition(shape, slots, seed):
    keys, mass = filled(seed, slots)
    q = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 2, 3, D)), jnp.float32)
    ours = heads(scores(build(keys, mass, slots, shape), q, slots, shape), shape.n_leaves(slots))
    half_step = 0 if shape.bits is None else float(jnp.ptp(keys)) / 255 / 2  # of a code, at most
    for head, wanted in enumerate(leaf_scores(keys, mass, q, slots, shape)):
        off = half_step * np.abs(q[:, head]).sum(-1).max() + 1e-5
        np.testing.assert_allclose(ours[head], wanted, rtol=1e-5, atol=off)


@settings(max_examples=5)
@given(every_shape, every_slots, st.integers(0, 9))
def test_bounds_bound(shape, slots, seed):
    """No key of a leaf scores above it, but where it has points; and no leaf above its root."""
    keys, mass = filled(seed, slots)
    q = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 2, 3, D)), jnp.float32)
    tree = build(keys, mass, slots, shape)
    rows = zip(
        *(heads(x, slots) for x in (keys, mass)),
        heads(scores(tree, q, slots, shape), shape.n_leaves(slots)),
        *(heads(x, shape.n_roots(slots)) for x in (tree.root_low, tree.root_high)),
        strict=True,
    )
    for head, (key, alive, score, low, high) in enumerate(rows):
        query = np.asarray(q[:, head])
        for slot in range(slots[head]):
            product = (query * key[:, None, slot]).sum(-1).max(-1)
            if shape.known_by == "box":
                assert (product <= score[:, slot // shape.leaf] + 1e-5)[alive[:, slot] > 0].all()
        if shape.root is not None:
            with np.errstate(invalid="ignore"):
                each = np.maximum(query[:, :, None] * low[:, None], query[:, :, None] * high[:, None])
            root = np.where(low[:, :, 0] <= high[:, :, 0], each.sum(-1).max(1), -np.inf)
            per_leaf = np.repeat(root, shape.children, axis=1)[:, : score.shape[1]]
            assert (score <= per_leaf + 1e-5).all()


@settings(max_examples=5)  # each compiles
@given(every_shape, every_slots, st.integers(1, 6), st.integers(0, 30), st.booleans(), st.booleans())
def test_descent_finds_what_an_evaluation_of_all_leaves_finds(shape, slots, n, seed, few, whole):
    """Keys and queries of whole numbers have many equal bounds: of these, too, the same ones are found."""
    keys, mass = filled(seed, slots, whole)
    rng = np.random.default_rng(seed)
    q = rng.integers(-2, 3, (2, 2, 2, D)) if whole else rng.normal(size=(2, 2, 2, D))
    q, forced = jnp.asarray(q, jnp.float32), jnp.asarray(rng.integers(-1, 2, (2, 2, 2)), jnp.int32)
    count = jnp.asarray(rng.integers(1, n + 1, 2), jnp.int32) if few else None
    tree = build(keys, mass, slots, shape)
    ours, made = best(tree, q, forced, n, slots, shape, count)
    flat = dataclasses.replace(shape, root=None)
    theirs, all_made = best(build(keys, mass, slots, flat), q, forced, n, slots, flat, count)
    np.testing.assert_array_equal(ours, theirs)
    n_roots = heads(jnp.isfinite(tree.root_low[..., 0]), shape.n_roots(slots))
    most = np.asarray(all_made) + np.stack([x.sum(1) for x in n_roots], axis=1)
    assert (np.asarray(made) <= most).all()
    wanted = leaf_scores(keys, mass, q, slots, shape)
    for b in range(2):
        for head, score in enumerate(wanted):
            always = {int(i) for i in forced[b, head] if 0 <= i < score.shape[1]}
            score = score[b].astype(np.float32)
            limit = n if count is None else int(count[b])
            score[list(always)] = np.inf
            order = [i for i in np.argsort(-score, kind="stable") if score[i] > -np.inf]
            got = np.asarray(ours[b, head])
            if (
                shape.known_by != "mean" and shape.bits is None
            ):  # else they are rounded, which may part equal ones
                assert got[got >= 0].tolist() == sorted(order[: len(always) + limit])
            assert (got[(got >= 0).sum() :] == -1).all()


@settings(max_examples=5)  # each compiles
@given(
    every_shape, every_slots, st.lists(st.sampled_from([1, 2, 7]), min_size=1, max_size=6), st.integers(0, 9)
)
@example(CODES, SLOTS[2], [2, 7, 1, 7], 0)
def test_a_tree_that_grew_is_the_one_that_is_built(shape, slots, chunks, seed):
    """Rows of two lengths, in chunks of any length: boxes and middles are the same, means up to rounding."""
    rng, fill = np.random.default_rng(seed), np.zeros((2, 2), int)
    keys = jnp.asarray(rng.normal(size=(2, sum(slots), D)), jnp.float32)
    tree, starts, n_rows = empty(2, D, jnp.float32, slots, shape), cache.starts(slots), sum(slots)
    mass = np.zeros((2, n_rows), np.float32)
    for n in chunks:
        take = np.minimum([[n], [rng.integers(0, n + 1)]], np.asarray(slots) - fill)  # [B K]
        lead = n - take[..., None]
        place = np.arange(n) - lead
        idx = np.where(place >= 0, fill[..., None] + place + starts[:, None], n_rows)
        for b in range(2):
            mass[b, idx[b][idx[b] < n_rows]] = 1
        new = jnp.take_along_axis(keys, jnp.minimum(idx, n_rows - 1).reshape(2, -1, 1), axis=1)
        new = jnp.where((idx < n_rows)[..., None], new.reshape(*idx.shape, D), jnp.nan)
        tree = refresh(tree, new, jnp.asarray(idx), jnp.asarray(mass), slots, shape)
        fill += take
    wanted = build(keys, jnp.asarray(mass), slots, shape)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * (shape.known_by == "mean")), tree, wanted
    )
    assert jax.tree.structure(tree) == jax.tree.structure(wanted)


def test_an_empty_tree_is_that_of_no_keys():
    for shape in SHAPES:
        ours, theirs = (
            empty(2, D, jnp.float32, (9, 20), shape),
            build(jnp.zeros((2, 29, D)), jnp.zeros((2, 29)), (9, 20), shape),
        )
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_roots_save_evaluations_where_few_chunks_matter():
    """A desert is seen by its roots alone."""
    keys = jnp.zeros((1, 1024, D)).at[0, 500:510].set(1.0)
    shape, none = Shape(8, 64), jnp.full((1, 1, 1), -1, jnp.int32)
    tree = build(keys, jnp.ones((1, 1024)), (1024,), shape)
    idx, made = best(tree, jnp.ones((1, 1, 1, D)), none, 2, (1024,), shape)
    assert idx[0, 0].tolist() == [62, 63, -1]
    assert int(made[0, 0]) == 16 + 8  # of 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaf": 0}, "a leaf is `pairs` equal parts, got leaf=0, pairs=1"),
        ({"pairs": 3}, "a leaf is `pairs` equal parts, got leaf=16, pairs=3"),
        ({"pairs": 0}, "a leaf is `pairs` equal parts"),
        ({"root": 40}, "a root is one or more whole leaves, got root=40, leaf=16: take a multiple, or None"),
        ({"root": 8}, "a root is one or more whole leaves"),
        ({"known_by": "median"}, "parts are known by one of box, mean, middle, got 'median'"),
        (
            {"bits": 8, "root": None},
            "codes have 8 bits, and are of middles without roots, got 8 bits, known_by='box'",
        ),
        ({"bits": 4, "root": None, "known_by": "middle"}, "codes have 8 bits, and are of middles"),
        ({"bits": 8, "known_by": "middle"}, "known_by='middle', root=128"),
    ],
)
def test_shapes_that_do_not_divide_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Shape(**change)
