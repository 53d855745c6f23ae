"""Quantised storage: errors within half a step, and writing one by one equals writing at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax import storage

SLOTS, D = (12, 20), 8


def rows(seed: int, batch: int = 2) -> jnp.ndarray:
    """Random rows with outlier channels, as keys have."""
    x = np.random.default_rng(seed).normal(size=(batch, sum(SLOTS), D))
    x[..., 2] *= 20
    return jnp.asarray(x, jnp.float32)


def settings(bits: int, block: int | None, window: int = 4) -> dict:
    return {"bits": bits, "block": block, "window": window, "slots": SLOTS}


def written(store, idx, x, mass):
    return storage.write([store], idx, [x], mass)[0]


ORDER = jnp.broadcast_to(jnp.concatenate([jnp.arange(s) for s in SLOTS]), (2, sum(SLOTS))).astype(jnp.float32)


@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.sampled_from([None, 4, 8]))
def test_values_are_within_half_a_step(seed, bits, block):
    x = rows(seed)
    store = storage.quantize(x, jnp.ones(x.shape[:2]), ORDER, settings(bits, block, window=8))
    error = np.abs(np.asarray(storage.read(store) - x))
    x = np.asarray(x)
    start = 0
    for size in SLOTS:
        part = x[:, start : start + size]
        for first in range(0, size, block or 1):
            group = part[:, first : first + (block or 1)]
            span = np.ptp(group, axis=2 if block is None else 1, keepdims=True)
            at = slice(start + first, start + first + group.shape[1])
            assert (error[:, at] <= span / (2**bits - 1) / 2 + 1e-5).all()
        start += size
    assert error.max() > 0


def test_the_recent_window_is_exact_and_the_rest_is_not():
    x = rows(0)
    store = storage.quantize(x, jnp.ones(x.shape[:2]), ORDER, settings(4, 4))
    error = np.abs(np.asarray(storage.read(store) - x)).max(-1)
    for start, size in ((0, 12), (12, 20)):
        assert (error[:, start + size - 4 : start + size] == 0).all()
        assert (error[:, start : start + size - 4] > 0).all()


def test_empty_rows_do_not_stretch_a_block():
    x = rows(1).at[:, 1].set(1e6)
    mass = jnp.ones(x.shape[:2]).at[:, 1].set(0.0)
    store = storage.quantize(x, mass, ORDER, settings(8, 4))
    error = np.abs(np.asarray(storage.read(store) - x))
    assert error[:, [0, 2, 3]].max() < 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [None, 4])
def test_filling_slots_in_order_equals_quantising_at_once(bits, block):
    x = rows(2)
    empty = storage.quantize(jnp.zeros_like(x), jnp.zeros(x.shape[:2]), ORDER, settings(bits, block))
    mass, store = jnp.zeros(x.shape[:2]), empty
    write = jax.jit(written)
    for i in range(max(SLOTS)):
        at = [start + i if i < size else sum(SLOTS) for start, size in ((0, 12), (12, 20))]
        idx = jnp.broadcast_to(jnp.asarray(at)[None, :, None], (2, 2, 1))
        mass = mass.at[:, jnp.asarray(at)].set(1.0, mode="drop")
        new = jnp.stack([x[:, min(a, sum(SLOTS) - 1)] for a in at], axis=1)[:, :, None]
        store = write(store, idx, new, mass)
    at_once = storage.quantize(x, mass, ORDER, settings(bits, block))
    np.testing.assert_allclose(store.scale, at_once.scale, rtol=1e-6)
    assert np.mean(np.asarray(store.codes) != at_once.codes) < 0.02  # ties round either way
    step = np.asarray(at_once.scale).max()
    assert np.abs(np.asarray(storage.read(store) - storage.read(at_once))).max() <= step * 1.01
    np.testing.assert_array_equal(storage.read(store)[:, [8, 11, 28, 31]], x[:, [8, 11, 28, 31]])


def test_an_overwritten_slot_gives_its_new_value():
    x = rows(3)
    store = storage.quantize(x, jnp.ones(x.shape[:2]), ORDER, settings(8, 4))
    new = jnp.full((2, 2, 1, D), 3.25)
    idx = jnp.broadcast_to(jnp.asarray([5, 31])[None, :, None], (2, 2, 1))
    after = np.asarray(storage.read(written(store, idx, new, jnp.ones(x.shape[:2]))))
    before = np.asarray(storage.read(store))
    np.testing.assert_array_equal(after[:, [5, 31]], 3.25)
    others = np.delete(np.arange(sum(SLOTS)), [5, 31])
    assert np.abs(after - before)[:, others].max() < 0.2  # neighbours in the block are rounded again


def test_four_bits_hold_two_codes_a_byte():
    x = rows(4)
    sizes = {
        b: storage.quantize(x, jnp.ones(x.shape[:2]), ORDER, settings(b, 4)).codes.nbytes for b in (4, 8)
    }
    assert sizes == {8: x.size, 4: x.size // 2}


def test_several_tokens_at_once_raise():
    x = rows(5)
    store = storage.quantize(x, jnp.ones(x.shape[:2]), ORDER, settings(8, 4))
    with pytest.raises(NotImplementedError, match="one token at a time, got T=2"):
        written(store, jnp.zeros((2, 2, 2), jnp.int32), jnp.zeros((2, 2, 2, D)), jnp.ones(x.shape[:2]))
