"""Assignment to codewords: the reference against loops in float64, ties, NaN, and what is refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.vq_assign import reference, vq_assign
from pallas_kernels.vq_assign.specs import excess

PLATFORMS = ("cpu", "gpu", "tpu")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assign(platform, x, codebook):
    with aim(Target(platform, "interpreted", "forward")):
        impl = "reference" if platform == "cpu" else platform
        return np.asarray(vq_assign(jnp.asarray(x), jnp.asarray(codebook), impl=impl))


@settings(max_examples=6, deadline=None)  # every shape compiles anew
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 9))
def test_reference_equals_loops_in_float64(batch, heads, tokens, codes, size):
    x, codebook = normal(codes, batch, heads, tokens, size), normal(size, heads, codes, size)
    out = vq_assign(jnp.asarray(x), jnp.asarray(codebook), impl="reference")
    assert out.dtype == jnp.int16
    out, x, codebook = np.asarray(out), x.astype(np.float64), codebook.astype(np.float64)
    for b, k, t in np.ndindex(batch, heads, tokens):
        gaps = [sum((x[b, k, t, d] - c[d]) ** 2 for d in range(size)) for c in codebook[k]]
        assert gaps[out[b, k, t]] <= min(gaps) + 1e-5 * (1 + max(gaps))


def test_reference_in_parts_equals_one_part(monkeypatch):
    x, codebook = jnp.asarray(normal(0, 2, 2, 37, 8)), jnp.asarray(normal(1, 2, 20, 8))
    whole = vq_assign(x, codebook, impl="reference")
    monkeypatch.setattr(reference, "_ELEMENTS", 10 * 2 * 2 * 20)
    np.testing.assert_array_equal(vq_assign(x, codebook, impl="reference"), whole)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("tokens", [1, 150])
def test_the_lowest_of_equal_codewords_is_taken(platform, tokens):
    """Also where the equal ones lie in different tiles and splits: whole numbers, so no rounding."""
    few = np.random.default_rng(0).integers(-3, 4, (1, 300, 32)).astype(np.float32)
    codebook = np.concatenate([few, few, few], axis=1)
    which = np.random.default_rng(1).integers(0, 300, (2, 1, tokens))
    lowest = np.array([np.flatnonzero((few[0] == row).all(-1))[0] for row in few[0]])
    np.testing.assert_array_equal(assign(platform, few[0][which], codebook), lowest[which])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_nan_gives_code_0_and_spoils_no_other(platform):
    x, codebook = normal(0, 1, 1, 20, 32), normal(1, 1, 40, 32)
    clean = assign(platform, x, codebook).copy()
    x[0, 0, 7, 3] = np.nan
    clean[0, 0, 7] = 0
    np.testing.assert_array_equal(assign(platform, x, codebook), clean)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_float32_is_told_apart_where_bfloat16_is_not(platform):
    """Codewords that differ by 2⁻¹², and vectors on them: the nearest is the right one."""
    codebook = 1 + np.arange(64, dtype=np.float32)[None, :, None] * np.float32(2.0**-12) * np.ones((1, 1, 16))
    codebook = codebook.astype(np.float32)
    out = assign(platform, codebook[None], codebook)
    assert excess(out, np.arange(64)[None, None], {"x": codebook[None], "codebook": codebook}) < 1e-6
    assert np.abs(out[0, 0] - np.arange(64)).max() <= 2


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_largest_code_fits(platform):
    codebook = np.zeros((1, 2**15, 16), np.float32)
    codebook[0, :, 0] = np.arange(2**15)
    x = np.zeros((1, 1, 1, 16), np.float32)
    x[..., 0] = 2.0**16
    assert assign(platform, x, codebook).tolist() == [[[2**15 - 1]]]


def test_types_may_differ():
    x, codebook = normal(0, 1, 2, 20, 32), jnp.asarray(normal(1, 2, 40, 32), jnp.bfloat16)
    expected = assign("cpu", x, codebook)
    for platform in ("gpu", "tpu"):
        out = assign(platform, x, codebook)
        assert excess(out, expected, {"x": x, "codebook": codebook}) < 1e-6


def test_another_metric_is_a_change_of_space():
    x, codebook, a = normal(0, 1, 1, 30, 8), normal(1, 1, 20, 8), normal(2, 8, 8)
    apart = (x[0, 0, :, None] - codebook[0]).astype(np.float64) @ a
    nearest = np.square(apart).sum(-1).argmin(-1)
    np.testing.assert_array_equal(assign("cpu", x @ a, codebook @ a)[0, 0], nearest)


def test_the_measure_counts_what_is_farther_and_passes_near_ties():
    codebook = np.array([[[0.0], [1.0], [1.0 + 1e-9], [5.0]]])
    arrays = {"x": np.full((1, 1, 1, 1), 1.0), "codebook": codebook}
    right = np.array([[[1]]])
    assert excess(right, right, arrays) == 0
    assert excess(np.array([[[2]]]), right, arrays) < 1e-9
    assert excess(np.array([[[0]]]), right, arrays) == 1
    assert excess(np.array([[[4]]]), right, arrays) == np.inf
    assert excess(np.array([[[-1]]]), right, arrays) == np.inf
    assert excess(np.array([[1]]), right, arrays) == np.inf


def test_what_is_refused():
    plain = inspect.unwrap(vq_assign)  # before the test run's check of annotations, which sees shapes first
    x, codebook = jnp.ones((1, 2, 3, 16)), jnp.ones((2, 5, 16))
    with pytest.raises(ValueError, match=r"with the same K and D, got x\.shape="):
        plain(x[:, :1], codebook)
    with pytest.raises(ValueError, match=r"with the same K and D, got x\.shape="):
        plain(x[..., :8], codebook)
    with pytest.raises(ValueError, match="1 to 32,768 codewords, got C=32769"):
        jax.eval_shape(vq_assign, x, jnp.zeros((2, 2**15 + 1, 16)))
    with pytest.raises(ValueError, match="1 to 32,768 codewords, got C=0"):
        plain(x, codebook[:, :0])
    with pytest.raises(ValueError, match="codewords are finite"):
        checked(vq_assign)(x, codebook.at[1, 2, 3].set(jnp.inf))
    with pytest.raises(NotImplementedError, match="runs on a GPU, got platform 'cpu'"):
        vq_assign(x, codebook, impl="gpu")


def test_what_kernels_refuse():
    wide = jnp.ones((1, 1, 1, 600)), jnp.ones((1, 2, 600))
    with pytest.raises(NotImplementedError, match="head sizes up to 256, got D=600"):
        assign("gpu", *wide)
    with pytest.raises(NotImplementedError, match="head sizes up to 512, got D=600"):
        assign("tpu", *wide)
    half = jnp.ones((1, 1, 1, 16), jnp.float16), jnp.ones((1, 2, 16), jnp.float16)
    with pytest.raises(NotImplementedError, match="float32 and bfloat16, got float16: cast x"):
        assign("tpu", *half)
    eight = jnp.ones((1, 1, 1, 16), jnp.float8_e4m3fn), jnp.ones((1, 2, 16), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="float16, got float8_e4m3fn: cast x"):
        assign("gpu", *eight)
