"""Rotation: what attention relies on."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.models.config import RopeConfig
from kvjax.rope import frequencies, rotate

SCALINGS = [
    RopeConfig(base=1e4),
    RopeConfig(base=1e6, scaling="linear", factor=8.0),
    RopeConfig(base=5e5, scaling="llama3", factor=8.0, original_context=8192),
    RopeConfig(base=1e4, scaling="yarn", factor=4.0, original_context=4096),
]


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda r: r.scaling)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 3000))
def test_only_distance_enters_a_dot_product(rope, i, j, shift):
    rng = np.random.default_rng(i)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 16)), jnp.float32)
    near = rotate(q, jnp.array([i]), rope) @ rotate(k, jnp.array([j]), rope).T
    far = rotate(q, jnp.array([i + shift]), rope) @ rotate(k, jnp.array([j + shift]), rope).T
    np.testing.assert_allclose(near, far, atol=5e-3)


@pytest.mark.parametrize("rope", SCALINGS[:3], ids=lambda r: r.scaling)
def test_rotation_keeps_the_norm(rope):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 16)), jnp.float32)
    turned = rotate(x, jnp.arange(7) * 100, rope)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert jnp.abs(turned[1:] - x[1:]).max() > 0.1


def test_unknown_scaling_raises():
    with pytest.raises(ValueError, match="RoPE scaling is none, linear, llama3 or yarn"):
        frequencies(RopeConfig(scaling="cubic"), 16)
