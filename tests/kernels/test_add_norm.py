"""add_norm against float64, and its rules."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import add_norm
from pallas_kernels.backend import Target, aim

GPU = Target("gpu", "interpreted", "forward")


@given(st.integers(0, 999), st.sampled_from([(1, 5), (3, 40)]), st.sampled_from([0.0, 1e-6, 0.1]))
def test_the_reference_is_the_formula_in_float64(seed, sizes, eps):
    rng = np.random.default_rng(seed)
    x, y, scale = rng.normal(size=sizes), 3 * rng.normal(size=sizes), rng.normal(size=sizes[1])
    total, norm = add_norm(*map(jnp.float32, (x, y, scale)), eps=eps, impl="reference")
    np.testing.assert_allclose(total, x + y, rtol=1e-6, atol=1e-6)
    expected = (x + y) / np.sqrt(((x + y) ** 2).mean(1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(norm, expected, rtol=1e-5, atol=1e-5)


def test_what_is_normed_is_the_sum_as_it_is_rounded():
    x, y = jnp.full((1, 64), 256, jnp.bfloat16), jnp.ones((1, 64), jnp.bfloat16)  # 257 has no bfloat16
    for impl in ("reference", "gpu"):
        with aim(GPU):
            total, norm = add_norm(x, y, jnp.ones(64), eps=0.0, impl=impl)
        assert (total == 256).all()
        assert (norm == 1).all()
        with aim(GPU):  # half of the sums are rounded to what the other half are
            total, norm = add_norm(x, y.at[:, ::2].set(0), jnp.full(64, 1001.0), eps=0.0, impl=impl)
        assert (total == 256).all()
        assert len(np.unique(np.asarray(norm, np.float32))) == 1


def test_it_says_what_is_wrong():
    x, bare = jnp.ones((1, 8)), inspect.unwrap(add_norm)  # as it is without the tests' checks of shapes
    with pytest.raises(ValueError, match=r"x and y are alike, .* got \(1, 8\) float32, \(2, 8\) float32"):
        bare(x, jnp.ones((2, 8)), jnp.ones(8), eps=0.0)
    with pytest.raises(ValueError, match=r"scale.shape=\(7,\)"):
        bare(x, x, jnp.ones(7), eps=0.0)
    wide = jnp.ones((1, 2**15))
    with aim(GPU), pytest.raises(NotImplementedError, match="rows of 16384 at most, got 32768"):
        add_norm(wide, wide, wide[0], eps=0.0, impl="gpu")
