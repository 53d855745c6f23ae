"""Ops on the rows of a cache against NumPy in float64: appended, marked, merged, rotated."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import (
    Codes,
    MergeForm,
    Ring,
    Turn,
    append_rows,
    mark_topk,
    merge_rows,
    rotate_rows,
    write_codes,
)
from pallas_kernels.attention import decode_codes, quantize
from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.registry import ops

seeds = st.integers(0, 10**6)
SLOTS, ROWS, D = (7, 12), 19, 8
SEEN = jnp.zeros(1, jnp.int32)
FREQUENCIES = 1e4 ** (-np.arange(0, D, 2) / D)
mark, append = jax.jit(mark_topk), jax.jit(lambda *args: append_rows(*args, slots=SLOTS))


def turned(x, pos, factor, back=False):
    angle = np.asarray(pos)[..., None] * FREQUENCIES * (-1 if back else 1)
    a, b = np.split(x, 2, axis=-1)
    out = np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )
    return out / factor if back else out * factor


@given(seeds)
def test_tokens_stand_where_they_are_said_to(seed):
    rng = np.random.default_rng(seed)
    store, new = rng.normal(size=(2, ROWS, D)), rng.normal(size=(2, 2, 4, D))
    fill = rng.integers(0, 13, size=(2, 2))
    valid = rng.random((2, 4)) < 0.7
    order = np.where(valid, np.cumsum(valid, 1) - 1, -1)
    wanted, first = np.float32(store).copy(), (0, SLOTS[0])
    seen = rng.integers(0, 99, size=2)
    for b, h, t in np.ndindex(2, 2, 4):
        slot = fill[b, h] + order[b, t]
        if valid[b, t] and slot < SLOTS[h]:
            wanted[b, first[h] + slot] = new[b, h, t]
    given_ = (jnp.float32(store), jnp.float32(new), *map(jnp.asarray, (fill, seen, order)))
    out, filled, counted, _ = append(*given_)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(filled, np.minimum(fill + valid.sum(1, keepdims=True), SLOTS))
    np.testing.assert_array_equal(counted, seen + valid.sum(1))


@given(seeds)
def test_keys_and_vectors_are_turned_on_the_way(seed):
    rng = np.random.default_rng(seed)
    k, v, q = (rng.normal(size=x) for x in ((2, 2, 4, D), (2, 2, 4, D), (2, 4, 2, 3, D)))
    pos = rng.integers(0, 300, size=(2, 4))
    angle = pos[..., None] * FREQUENCIES
    turn = Turn(1.5 * np.cos(angle), 1.5 * np.sin(angle), {"q": q, "none": None}, (True, False))
    stores, rows, turn = jax.tree.map(jnp.float32, ((np.zeros((2, ROWS, D)),) * 2, (k, v), turn))
    order = jnp.broadcast_to(jnp.arange(4), (2, 4))
    (keys, values), *_, vectors = append(stores, rows, jnp.zeros((2, 2), int), jnp.zeros(2, int), order, turn)
    for head, first in enumerate((0, SLOTS[0])):
        np.testing.assert_allclose(keys[:, first : first + 4], turned(k[:, head], pos, 1.5), atol=1e-4)
        np.testing.assert_array_equal(values[:, first : first + 4], np.float32(v[:, head]))
    np.testing.assert_allclose(vectors["q"], turned(q, pos[:, :, None, None], 1.5), atol=1e-4)
    assert vectors["none"] is None


def test_tokens_that_the_kernel_writes_have_the_references_gradients():
    rng = np.random.default_rng(0)
    store, rows, weight = (
        jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((1, ROWS, D), (1, 2, 3, D), (ROWS, D))
    )
    stores, fill = (store, jnp.zeros((1, ROWS), jnp.int32)), jnp.asarray([[5, 0]])

    def loss(store, row, impl):
        given_ = (
            (store, stores[1]),
            (row, jnp.ones((1, 2, 3), jnp.int32)),
            fill,
            SEEN,
            jnp.asarray([[0, 1, 2]]),
        )
        return (append_rows(*given_, slots=SLOTS, impl=impl)[0][0] ** 2 * weight).sum()

    expected = jax.grad(loss, (0, 1))(store, rows, "reference")
    with aim(Target("gpu", "interpreted", "forward")):
        found = jax.grad(loss, (0, 1))(store, rows, "gpu")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.abs(found[1]).max() > 0


@given(seeds)
def test_the_largest_are_marked_and_of_equals_the_first(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 3, size=(3, 21)).astype(np.float32) * rng.choice([1.0, -0.0], size=(3, 21))
    x[rng.random(x.shape) < 0.2] = -np.inf
    k = rng.integers(-1, 25, size=3)
    marks = np.asarray(mark(jnp.asarray(x), jnp.asarray(k)))
    for row, n, found in zip(x, k, marks, strict=True):
        best = sorted((i for i in range(21) if row[i] > -np.inf), key=lambda i: (-row[i], i))[: max(n, 0)]
        assert sorted(best) == np.flatnonzero(found).tolist()


def merged(x, n, old, into, pos, factor):
    """Group by group, in float64."""
    rows, ns, places = [], [], []
    for row in old:
        group = [row, *np.flatnonzero(into == row)] if row >= 0 else []
        weights = n[group]
        places.append(round(np.average(pos[group], weights=weights)) if group else 0)
        plain = [turned(x[i], pos[i], factor, back=True) for i in group]
        mean = (
            turned(np.average(plain, axis=0, weights=weights), places[-1], factor) if group else np.zeros(D)
        )
        rows.append(x[row] if len(group) == 1 else mean)
        ns.append(weights.sum())
    return np.array(rows), np.array(ns), np.array(places)


@pytest.mark.parametrize("reach", [None, 19])
def test_merges_are_the_means_of_what_goes_into_a_row(reach):
    rng = np.random.default_rng(0)
    x, values = rng.normal(size=(2, 2, ROWS, D)).astype(np.float32)
    n, pos = rng.integers(1, 5, size=(2, ROWS)).astype(np.float32), rng.integers(0, 400, size=(2, ROWS))
    into = np.full((2, ROWS), ROWS)
    into[0, [0, 2, 9, 10, 15]], into[1, [5, 3, 11, 17, 18]] = [3, 3, 12, 8, 12], [1, 6, 10, 10, 10]
    stay = [np.flatnonzero(row == ROWS) for row in into]
    old = np.array([np.pad(row, (0, 2), constant_values=-1) for row in stay])
    values[1, 0] = np.nan  # stays, and is its own affair
    out = merge_rows(
        (jnp.asarray(x), jnp.asarray(values)), jnp.asarray(n), jnp.asarray(old), jnp.asarray(into),
        jnp.asarray(pos), jnp.asarray(FREQUENCIES, jnp.float32),
        form=MergeForm(SLOTS, most=5, reach=reach, factor=1.5),
    )  # fmt: skip
    for b in range(2):
        keys, ns, places = merged(np.float64(x[b]), n[b], old[b], into[b], pos[b], 1.5)
        np.testing.assert_allclose(out.rows[0][b], keys, atol=2e-6)
        np.testing.assert_array_equal(out.n[b], ns)
        np.testing.assert_array_equal(out.pos[b], places)
        alone = ~np.isin(stay[b], into[b])
        for made, given_ in zip(out.rows, (x, values), strict=True):
            np.testing.assert_array_equal(np.asarray(made[b])[: len(alone)][alone], given_[b][stay[b][alone]])
    assert np.isnan(out.rows[1]).sum() == D
    assert out.n.sum() == n.sum()


def test_rotations_are_the_formula_and_are_undone():
    rng = np.random.default_rng(1)
    x, pos = rng.normal(size=(2, 5, D)), rng.integers(0, 3000, size=(2, 5))
    given_ = jnp.asarray(x, jnp.float32), jnp.asarray(pos), jnp.asarray(FREQUENCIES, jnp.float32)
    out = rotate_rows(*given_, factor=1.5)
    np.testing.assert_allclose(out, turned(x, pos, 1.5), atol=3e-4)
    np.testing.assert_allclose(rotate_rows(out, *given_[1:], factor=1.5, back=True), x, atol=1e-6)


@given(seeds, st.sampled_from([4, 8]))
def test_a_block_is_scaled_by_its_exact_rows_and_by_codes_where_there_are_none(seed, bits):
    rng, block, window, first = np.random.default_rng(seed), 5, 4, (0, SLOTS[0])
    x, exact, new = (
        rng.normal(size=(1, ROWS, D)),
        rng.normal(size=(1, 2, window, D)),
        rng.normal(size=(1, 2, D)),
    )
    store = quantize(jnp.float32(x), bits, SLOTS, block)
    old = np.float64(decode_codes(store, SLOTS))[0]
    at = [first[h] + rng.integers(0, SLOTS[h]) for h in range(2)]
    slot = np.stack([first[h] + rng.permutation(SLOTS[h])[:window] for h in range(2)])[None]
    mass = (rng.random((1, ROWS)) < 0.8).astype(np.float32)
    mass[0, at] = 1
    ring = Ring(*map(jnp.asarray, (np.float32(exact), slot, np.full((1, 2), 1))))
    given_ = ([store], [ring], [jnp.float32(new)], jnp.asarray([at]), jnp.asarray(mass))
    (written,), (ring,) = write_codes(*given_, slots=SLOTS)
    out = np.float64(decode_codes(written, SLOTS))[0]
    for h in range(2):
        kept = {slot[0, h, w]: exact[0, h, w] for w in range(window) if w != 1}  # 1 makes room
        kept[at[h]] = new[0, h]
        begin = first[h] + (at[h] - first[h]) // block * block
        rows = range(begin, min(begin + block, first[h] + SLOTS[h]))
        wanted = np.stack([kept.get(r, old[r]) for r in rows])
        alive = mass[0, list(rows)] > 0
        step = np.maximum(np.ptp(wanted[alive], axis=0), 1e-8) / (2**bits - 1)
        assert (np.abs(out[list(rows)] - wanted)[alive] <= step / 2 + 1e-5).all()
        others = [r for r in range(first[h], first[h] + SLOTS[h]) if r not in rows]
        np.testing.assert_array_equal(out[others], old[others])
        np.testing.assert_array_equal(ring.rows[0, h, 1], np.float32(new[0, h]))
        assert ring.slot[0, h, 1] == at[h]
        assert (np.asarray(ring.slot[0, h]) == at[h]).sum() == 1
        assert ring.turn[0, h] == 2


def test_gradients_go_through_new_codes_rows_as_through_the_reference():
    spec = next(spec for spec in ops()["write_codes"].specs if spec.dtype == "float32")
    given_ = spec.arrays(jax.random.key(0))

    def loss(rows, impl):
        stores, rings = write_codes(**(given_ | {"rows": rows}), slots=spec.slots, impl=impl)
        values = [decode_codes(store, spec.slots) for store in stores]
        return sum((x**2).sum() for x in (*values, *(ring.rows for ring in rings)))

    expected = jax.grad(loss)(given_["rows"], "reference")
    with aim(Target("gpu", "interpreted", "forward")):
        found = jax.jit(jax.grad(loss), static_argnums=1)(given_["rows"], "gpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    assert all(np.abs(x).max() > 0 for x in found)


def test_blocks_that_no_program_holds_are_refused():
    slots, x = (1024,), jnp.ones((1, 1024, D))
    ring = Ring(x[:, None], jnp.arange(1024)[None, None], jnp.zeros((1, 1), int))
    given_ = ([quantize(x, 8, slots, 1024)], [ring], [x[:, :1]], jnp.zeros((1, 1), int), x[..., 0])
    with (
        aim(Target("gpu", "interpreted", "forward")),
        pytest.raises(NotImplementedError, match="holds a block"),
    ):
        write_codes(*given_, slots=slots, impl="gpu")


def places(at):
    return at[:, :1], SEEN, at[:, :1]


def written(x, row, idx, n_scales=4):
    store = Codes(x.astype(jnp.uint8), x[:, :n_scales, :1], x[:, :n_scales, :1], 8, None)
    ring = Ring(x[:, None, :2], jnp.zeros((1, 1, 2), jnp.int32), idx[:, :1])
    return write_codes([store], [ring], [row], idx, jnp.ones((1, 4)), slots=(4,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, n, at: append_rows(x, x[:, None, :1], *places(at), slots=(3,)), "row per slot"),
        (lambda x, n, at: append_rows(x, at[:, None, :1, None], *places(at), slots=(4,)), "type"),
        (lambda x, n, at: append_rows(x, x[:, None, :1], at, SEEN, at[:, :1], slots=(4,)), "first free slot"),
        (
            lambda x, n, at: append_rows(
                x, x[:, None, :1], *places(at), Turn(x[:, :2], x[:, :2], None, (True,)), slots=(4,)
            ),
            "a cosine and a sine",
        ),
        (lambda x, n, at: merge_rows((x,), n, at, at, form=MergeForm((5,), 1)), "goes into one or stays"),
        (lambda x, n, at: merge_rows((x,), n, at, at, None, n[0], form=MergeForm((4,), 1)), "positions"),
        (lambda x, n, at: written(x, x[:, :1], at[:, :2]), "each slot has a mass"),
        (lambda x, n, at: written(x, x[:, :1, :3], at[:, :1]), "a ring, a new row and the codes"),
        (lambda x, n, at: written(x, x[:, :1], at[:, :1], 3), "scales and zeros"),
        (lambda x, n, at: inspect.unwrap(rotate_rows)(x[..., :3], at, n[0, :1]), "two channels a freq"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((1, 4, D)), jnp.ones((1, 4)), jnp.zeros((1, 4), jnp.int32))


def test_more_rows_than_were_to_merge_are_told():
    x, n, old = jnp.ones((1, 4, 2)), jnp.ones((1, 4)), jnp.asarray([[0, 2, -1]])
    merged = checked(lambda into: merge_rows((x,), n, old, into, form=MergeForm((4,), 1)))
    merged(jnp.asarray([[4, 0, 4, 4]]))
    with pytest.raises(ValueError, match="more rows merge than"):
        merged(jnp.asarray([[4, 0, 4, 2]]))
