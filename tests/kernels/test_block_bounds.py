"""Block bounds: the reference against loops in float64, and what the op refuses."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.block_bounds import block_bounds


def loops(k, mass, slots, block):
    """Bounds [B N D] by the definition, block by block."""
    low, high, first = [], [], 0
    for size in slots:
        for at in range(0, size, block):
            rows = slice(first + at, first + min(at + block, size))
            alive = mass[:, rows, None] > 0
            low.append(np.where(alive, k[:, rows], np.inf).min(1))
            high.append(np.where(alive, k[:, rows], -np.inf).max(1))
        first += size
    return np.stack(low, 1), np.stack(high, 1)


@settings(max_examples=8)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 25), st.integers(0, 2**16))
def test_reference_is_the_definition(slots, block, seed):
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(2, sum(slots), 3)).astype(np.float32)
    mass = rng.integers(0, 3, k.shape[:2]).astype(np.float32)
    k[mass == 0] = np.nan
    options = {"slots": tuple(slots), "block": block, "impl": "reference"}
    out = jax.jit(lambda k, mass: block_bounds(k, mass, **options))(k, mass)
    for bound, expected in zip(out, loops(k.astype(np.float64), mass, slots, block), strict=True):
        np.testing.assert_array_equal(bound, expected)


def test_a_block_without_keys_has_low_above_high():
    k = jnp.full((1, 8, 4), jnp.nan, jnp.bfloat16)
    low, high = block_bounds(k, jnp.zeros((1, 8)), slots=(8,), block=4)
    assert low.dtype == high.dtype == jnp.bfloat16
    assert np.all(np.asarray(low, np.float32) == np.inf)
    assert np.all(np.asarray(high, np.float32) == -np.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "a block has at least 1 slot, got block=0"),
        ({"slots": (8, 4)}, "k has a row per slot of each head"),
        ({"slots": (16, 0)}, "k has a row per slot of each head"),
        ({"mass": jnp.ones((2, 8))}, r"one mass per slot, \(1, 16\), got mass.shape=\(2, 8\)"),
    ],
)
def test_refuses(change, message):
    args = {"k": jnp.ones((1, 16, 4)), "mass": jnp.ones((1, 16)), "slots": (8, 8), "block": 4} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(block_bounds)(**args)  # else the test run's annotations see shapes first


def test_debug_mode_refuses_a_mass_that_is_none():
    def call(mass):
        return block_bounds(jnp.ones((1, 4, 2)), mass, slots=(4,), block=2)

    with pytest.raises(ValueError, match="not negative and not NaN"):
        checked(call)(jnp.full((1, 4), jnp.nan))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_kernels_refuse_a_type(platform):
    k = jax.ShapeDtypeStruct((1, 16, 64), jnp.float8_e4m3fn)
    mass = jax.ShapeDtypeStruct((1, 16), jnp.float32)
    with (
        aim(Target(platform, "interpreted", "forward")),
        pytest.raises(NotImplementedError, match="takes float32"),
    ):
        jax.eval_shape(lambda k, m: block_bounds(k, m, slots=(16,), block=4, impl=platform), k, mass)


def test_the_tpu_kernel_refuses_large_blocks():
    shapes = jax.ShapeDtypeStruct((1, 4096, 64), jnp.float32), jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    with (
        aim(Target("tpu", "interpreted", "forward")),
        pytest.raises(NotImplementedError, match="bounds of smaller blocks"),
    ):
        jax.eval_shape(lambda k, m: block_bounds(k, m, slots=(4096,), block=2048, impl="tpu"), *shapes)
