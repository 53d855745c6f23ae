"""gate_up: its reference against float64, what is not read, and its rules."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import gate_up, tuning, vmmsp
from pallas_kernels.backend import Target, aim
from pallas_kernels.gate_up import gpu
from pallas_kernels.gate_up.specs import OP, GateUpSpec

GPU, TPU = (Target(name, "interpreted", "forward") for name in ("gpu", "tpu"))
ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@given(seed=st.integers(0, 999), act=st.sampled_from(tuple(ACTS)), weighed=st.booleans(), coded=st.booleans())
@pytest.mark.parametrize("sizes", [(1, 9, 7), (3, 5, 8)])
def test_the_reference_is_the_formula_in_float64(sizes, seed, act, weighed, coded):
    batch, rows, width = sizes
    rng = np.random.default_rng(seed)
    x, gate_t, up_t = (rng.normal(size=size) for size in ((batch, width), (rows, width), (rows, width)))
    weight = rng.uniform(0.5, 2, rows) if weighed else None
    scales = tuple(rng.uniform(0.01, 0.1, rows) for _ in range(2)) if coded else None
    if coded:
        gate_t, up_t = np.round(20 * gate_t), np.round(20 * up_t)
    one, two = scales or (1, 1)
    gate = ACTS[act](x @ gate_t.T * one)
    scores = np.abs(gate) * (1 if weight is None else weight)
    level = np.sort(scores.ravel())[scores.size // 2] + 1e-4  # of no gate
    expected = np.where(scores >= level, gate * (x @ up_t.T * two), 0)
    dtype = jnp.int8 if coded else jnp.float32
    out = gate_up(
        jnp.float32(x), jnp.asarray(gate_t, dtype), jnp.asarray(up_t, dtype), jnp.float32(level),
        None if weight is None else jnp.float32(weight), act=act, impl="reference",
        scales=None if scales is None else tuple(map(jnp.float32, scales)),
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)
    assert 0 < np.count_nonzero(out) < out.size


@pytest.mark.parametrize("at", [GPU, TPU], ids=["gpu", "tpu"])
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_of_up_below_the_level_are_not_used(at, batch):
    arrays = GateUpSpec(batch, 300, 200, 1.0, "float32").arrays(jax.random.key(0))
    assert jnp.isnan(arrays["up_t"]).all()
    with aim(at):
        assert (gate_up(**arrays, impl=at.platform) == 0).all()


@pytest.mark.parametrize(
    "chosen", [gpu.Settings(rows=1, loads=4, warps=1), gpu.Settings(rows=8, loads=2, warps=4)]
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_settings_do_not_change_the_result(chosen, dtype):
    spec = GateUpSpec(1, 500, 260, 0.5, dtype)
    arrays = spec.arrays(jax.random.key(1))
    with aim(GPU), tuning.force("gate_up", chosen):
        out = gate_up(**arrays, impl="gpu")
    assert OP.error(out, gate_up(**arrays, impl="reference"), arrays) <= spec.limit()


def test_a_level_of_zero_leaves_out_nothing_and_no_number_stays_none():
    arrays = GateUpSpec(1, 64, 32, 0.5, "float32").arrays(jax.random.key(2)) | {"level": jnp.float32(0)}
    arrays["up_t"] = jnp.ones((64, 32))
    arrays["gate_t"] = arrays["gate_t"].at[3].set(jnp.nan)
    for impl in ("reference", "gpu"):
        with aim(GPU):
            out = gate_up(**arrays, impl=impl)
        assert jnp.isnan(out[0, 3])
        assert (jnp.delete(out[0], 3) != 0).all()


def test_it_is_vmmsp_of_the_gate():
    arrays = GateUpSpec(2, 300, 200, 0.7, "float32").arrays(jax.random.key(3))
    gate = jax.nn.silu(arrays["x"] @ arrays["gate_t"].T)
    gate = jnp.where(jnp.abs(gate) * arrays["weight"] < arrays["level"], 0, gate)
    np.testing.assert_allclose(
        gate_up(**arrays), vmmsp(arrays["x"], gate, arrays["up_t"]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "relu"}, "an act is one of silu, gelu_tanh, got act='relu'"),
        ({"up_t": jnp.ones((4, 3))}, r"are of one type, got \(4, 2\) float32 and \(4, 3\) float32"),
        ({"weight": jnp.ones(3)}, r"one weight per channel, 4, got weight.shape=\(3,\)"),
        ({"scales": (jnp.ones(4),) * 2}, "int8 weights, and no others, come with scales"),
    ],
)
def test_it_says_what_is_wrong(change, message):
    given_ = {
        "x": jnp.ones((1, 2)),
        "gate_t": jnp.ones((4, 2)),
        "up_t": jnp.ones((4, 2)),
        "level": jnp.float32(0),
    }
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(gate_up)(**given_ | change)  # as it is without the tests' checks of shapes


def test_a_batch_that_is_too_large_is_refused():
    x, w = jnp.ones((9, 16)), jnp.ones((32, 16))
    for at in (GPU, TPU):
        with aim(at), pytest.raises(NotImplementedError, match="batches up to 8, got B=9"):
            gate_up(x, w, w, jnp.float32(0), impl=at.platform)
