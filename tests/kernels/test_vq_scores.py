"""Scores by codes: the reference against loops in float64, exactness of the look-up, and what is refused."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.vq_scores import vq_scores

PLATFORMS = ("cpu", "gpu", "tpu")


def inputs(batch, heads, group, size, n_codes, slots):
    rng = np.random.default_rng(slots)
    q, codebook = rng.normal(size=(batch, heads, group, size)), rng.normal(size=(heads, n_codes, size))
    codes = rng.integers(-1, n_codes, (batch, heads, slots))
    return jnp.asarray(q, jnp.float32), jnp.asarray(codebook, jnp.float32), jnp.asarray(codes, jnp.int16)


def score(platform, *args, **options):
    with aim(Target(platform, "interpreted", "forward")):
        impl = "reference" if platform == "cpu" else platform
        return np.asarray(vq_scores(*args, **options, impl=impl))


@settings(max_examples=6, deadline=None)  # every shape compiles anew
@given(*(st.integers(1, most) for most in (3, 3, 4, 9, 20, 30)))
def test_reference_equals_loops_in_float64(batch, heads, group, size, n_codes, slots):
    q, codebook, codes = inputs(batch, heads, group, size, n_codes, slots)
    out = vq_scores(q, codebook, codes, impl="reference")
    most = vq_scores(q, codebook, codes, reduce="max", impl="reference")
    q, codebook, codes = (np.asarray(x, np.float64) for x in (q, codebook, codes))
    expected = np.full((batch, heads, group, slots), -np.inf)
    for b, k, g, s in np.ndindex(*expected.shape):
        if codes[b, k, s] >= 0:
            word = codebook[k, int(codes[b, k, s])]
            expected[b, k, g, s] = sum(q[b, k, g, d] * word[d] for d in range(size))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(most, expected.max(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("n_codes", [1, 130])
def test_the_look_up_copies_bits(platform, n_codes):
    """Slots of one code have one score, to the last bit: the look-up rounds nothing."""
    q, codebook, codes = inputs(2, 2, 2, 16, n_codes, 300)
    out, codes = score(platform, q, codebook, codes), np.asarray(codes)
    for b, k, code in np.ndindex(2, 2, n_codes):
        assert all(len(np.unique(row[codes[b, k] == code])) <= 1 for row in out[b, k])
    assert (np.isneginf(out) == (codes < 0)[:, :, None]).all()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_maximum_is_that_of_the_scores(platform):
    q, codebook, codes = inputs(2, 3, 3, 16, 40, 50)
    for dtype in ("float32", "bfloat16"):
        scores = score(platform, q, codebook, codes, dtype=dtype)
        assert scores.dtype == dtype
        most = score(platform, q, codebook, codes, dtype=dtype, reduce="max")
        np.testing.assert_array_equal(most, scores.max(2))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_empty_slots_and_unknown_codes_score_least(platform):
    q, codebook, _ = inputs(1, 1, 2, 16, 5, 1)
    codes = jnp.array([[[-1, 4, -(2**15), 5, 2**15 - 1]]], jnp.int16)
    out = score(platform, q, codebook, codes)
    assert np.isfinite(out[0, 0, :, 1]).all()
    assert np.isneginf(np.delete(out, 1, axis=-1)).all()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_types_of_queries_and_codewords_may_differ(platform):
    q, codebook, codes = inputs(1, 2, 4, 32, 40, 50)
    codebook = codebook.astype(jnp.bfloat16)
    expected = vq_scores(q, codebook.astype(jnp.float32), codes, impl="reference")
    np.testing.assert_allclose(score(platform, q, codebook, codes), expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    plain = inspect.unwrap(vq_scores)  # before the test run's check of annotations, which sees shapes first
    q, codebook, codes = inputs(1, 2, 4, 16, 5, 10)
    with pytest.raises(ValueError, match=r"with the same K and D, got q\.shape="):
        plain(q[:, :1], codebook, codes)
    with pytest.raises(ValueError, match=r"with the same K and D, got q\.shape="):
        plain(q[..., :8], codebook, codes)
    with pytest.raises(ValueError, match=r"for each KV head of q, got codes\.shape="):
        plain(q, codebook, codes[:, :1])
    with pytest.raises(TypeError, match=r"int16, got int32: use codes.astype\(jnp.int16\)"):
        vq_scores(q, codebook, codes.astype(jnp.int32))
    with pytest.raises(ValueError, match="1 to 32,768 codewords, got C=32769"):
        vq_scores(q, jnp.zeros((2, 2**15 + 1, 16)), codes)
    with pytest.raises(ValueError, match="reduce is None or \"max\", got reduce='sum'"):
        vq_scores(q, codebook, codes, reduce="sum")
    with pytest.raises(ValueError, match="float32, bfloat16 or float16, got int32"):
        plain(q, codebook, codes, dtype=jnp.int32)
    with pytest.raises(ValueError, match="a code is the index of a codeword"):
        checked(vq_scores)(q, codebook, codes.at[0, 0, 0].set(5))
    with pytest.raises(NotImplementedError, match="runs on a TPU, got platform 'cpu'"):
        vq_scores(q, codebook, codes, impl="tpu")


def test_what_kernels_refuse():
    q, codebook, codes = inputs(1, 1, 2, 300, 5, 10)
    with pytest.raises(NotImplementedError, match=r"256 channels and 128 query heads .* got D=300 and G=2"):
        score("gpu", q, codebook, codes)
    with pytest.raises(NotImplementedError, match=r"float16, got q\.dtype=float8"):
        score("gpu", q.astype(jnp.float8_e4m3fn), codebook, codes)
    with pytest.raises(NotImplementedError, match="float32 and bfloat16, got dtype=float16"):
        score("tpu", q, codebook, codes, dtype="float16")
    with pytest.raises(NotImplementedError, match=r"bytes of vector memory, got .* for G=32 and C=32768"):
        score("tpu", jnp.ones((1, 1, 32, 16)), jnp.ones((1, 2**15, 16)), codes)
