"""Bound scores: the reference against loops in float64, that they bound, and what the op refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Target, aim
from pallas_kernels.block_bounds import block_bounds
from pallas_kernels.bound_scores import bound_scores


def loops(q, low, high, n_blocks):
    """Upper and lower bounds [B N], block by block and query by query."""
    upper, lower = np.full(low.shape[:2], -np.inf), np.full(low.shape[:2], -np.inf)
    head = np.repeat(np.arange(len(n_blocks)), n_blocks)
    for b, n in np.ndindex(low.shape[:2]):
        if np.all(low[b, n] <= high[b, n]):
            ends = np.stack([q[b, head[n]] * low[b, n], q[b, head[n]] * high[b, n]])  # [2 G D]
            upper[b, n] = ends.max(0).sum(-1).max()
            lower[b, n] = ends.min(0).sum(-1).max()
    return upper, lower


@settings(max_examples=8)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 2**16))
def test_reference_is_the_definition(n_blocks, group, seed):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, len(n_blocks), group, 5)).astype(np.float32)
    q[..., 0] = 0  # 0·inf
    low, high = np.sort(rng.normal(size=(2, 2, sum(n_blocks), 5)), axis=0).astype(np.float32)
    empty = rng.random(low.shape[:2]) < 0.3
    low[empty], high[empty] = np.inf, -np.inf
    expected = loops(*(x.astype(np.float64) for x in (q, low, high)), n_blocks)
    options = {"n_blocks": tuple(n_blocks), "impl": "reference"}
    out = jax.jit(lambda *x: bound_scores(*x, lower=True, **options))(q, low, high)
    for a, b in zip(out, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    alone = jax.jit(lambda *x: bound_scores(*x, **options))(q, low, high)
    np.testing.assert_array_equal(alone, out[0])


def test_bounds_hold_for_the_keys_of_a_block():
    keys = jax.random.split(jax.random.key(1), 2)
    q, k = jax.random.normal(keys[0], (1, 1, 4, 16)), jax.random.normal(keys[1], (1, 64, 16))
    low, high = block_bounds(k, jnp.ones((1, 64)), slots=(64,), block=8)
    upper, lower = bound_scores(q, low, high, n_blocks=(8,), lower=True)
    best = jnp.einsum("bkgd,brd->bgr", q, k).max(1).reshape(1, 8, 8)  # of the group, per slot
    assert np.all(best <= upper[..., None] + 1e-4)
    assert np.all(best >= lower[..., None] - 1e-4)


@pytest.mark.parametrize(
    ("n_blocks", "shape", "message"),
    [
        ((3,), (1, 3, 8), r"one positive number of blocks per KV head, got n_blocks=\(3,\)"),
        ((3, 0), (1, 3, 8), "one positive number of blocks per KV head"),
        (
            (2, 2),
            (1, 3, 8),
            r"a row per block and the head size of q, \(1, 4, 8\), got low.shape=\(1, 3, 8\)",
        ),
    ],
)
def test_refuses(n_blocks, shape, message):
    with pytest.raises(ValueError, match=message):
        bound_scores(jnp.ones((1, 2, 4, 8)), jnp.ones(shape), jnp.ones(shape), n_blocks=n_blocks)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [(jnp.float8_e4m3fn, 64, "takes float32"), (jnp.float32, 1024, "takes head sizes up to .*, got D=1024")],
)
def test_kernels_refuse(platform, dtype, size, message):
    q, bound = (jax.ShapeDtypeStruct(s, dtype) for s in ((1, 1, 4, size), (1, 16, size)))
    with aim(Target(platform, "interpreted", "forward")), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda *x: bound_scores(*x, n_blocks=(16,), impl=platform), q, bound, bound)
