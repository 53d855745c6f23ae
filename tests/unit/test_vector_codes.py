"""Codes of vectors against the vectors: products within half a step of a channel."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.vector_codes import absent, coded, products

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 9, 16)) + RNG.normal(size=(2, 3, 9, 1)) * 5  # far from 0, as real keys are
Q = RNG.normal(size=(2, 3, 4, 16))
NONE = np.zeros((2, 3, 9), bool)
NONE[:, :, ::4] = True


@pytest.mark.parametrize(("dtype", "off"), [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_products_are_those_of_the_vectors_within_half_a_step(dtype, off):
    x = jnp.asarray(np.where(NONE[..., None], np.inf, X), dtype)
    found = coded(x)
    exact = np.einsum("bngd,bnsd->bngs", Q, np.where(NONE[..., None], 0, np.asarray(x, np.float64)))
    np.testing.assert_array_equal(absent(found), NONE)
    np.testing.assert_array_equal(absent(x), NONE)
    np.testing.assert_allclose(products(jnp.asarray(Q, jnp.float32), x), exact, atol=1e-4)
    step = np.asarray(found.scale, np.float64)[..., 0]
    most = step / 2 + off * np.abs(X).max(-1)  # of a channel, and of the rounding of scale and least value
    error = np.abs(products(jnp.asarray(Q, jnp.float32), found) - exact)
    assert (error <= np.abs(Q).sum(-1)[..., None] * most[:, :, None] + 1e-4)[..., ~NONE[0, 0]].all()
    assert found.codes.dtype == jnp.uint8
    assert (np.asarray(found.codes)[~NONE].max(-1) >= 254).all(), "all of the range is used"
