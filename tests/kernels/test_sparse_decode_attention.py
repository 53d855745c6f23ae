"""Sparse decode attention: its reference against loops, lists of none, host memory, and messages."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import backend, tolerance, tuning
from pallas_kernels.attention import AttentionForm, quantize
from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.sparse_decode_attention import gpu, sparse_decode_attention, tpu
from pallas_kernels.sparse_decode_attention.specs import SparseSpec

INTERPRETED = {name: Target(name, "interpreted", "forward") for name in ("gpu", "tpu")}
HOST = jax.memory.Space.Host


def loops(q, k, v, mass, idx, form, block):
    """The equation in float64, one query head at a time."""
    q, k, v, mass = (np.asarray(x, np.float64) for x in (q, k, v, mass))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    first = np.cumsum([0, *form.slots])
    for b, head, g in np.ndindex(q.shape[:3]):
        slots = [i * block + j for i in np.asarray(idx)[b, head] if i >= 0 for j in range(block)]
        rows = [first[head] + s for s in slots if s < form.slots[head]]
        rows = [row for row in rows if mass[b, row] > 0]
        if rows:
            logit = k[b, rows] @ q[b, head, g] * form.factor(q.shape[3])
            if form.softcap is not None:
                logit = form.softcap * np.tanh(logit / form.softcap)
            logit = logit + np.log(mass[b, rows])
            lse[b, head, g] = np.logaddexp.reduce(logit)
            out[b, head, g] = np.exp(logit - lse[b, head, g]) @ v[b, rows]
    return out, lse


def case(slots, block, n, *, batch=2, group=2, size=64, dtype="float32", seed=0, **form):
    """Random inputs with empty slots that hold NaN, repeated indices, and none anywhere."""
    rng = np.random.default_rng(seed)
    rows = sum(slots)
    q = rng.normal(size=(batch, len(slots), group, size))
    k, v = rng.normal(size=(2, batch, rows, size))
    mass = np.floor(rng.uniform(0, 4, (batch, rows)))
    k[mass == 0] = v[mass == 0] = np.nan
    idx = np.stack([rng.integers(-1, -(-s // block), (batch, n)) for s in slots], axis=1)
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
    arrays += [jnp.asarray(mass, jnp.float32), jnp.asarray(idx, jnp.int32)]
    return arrays, {"form": AttentionForm(slots, lse=True, **form), "block": block}


@given(
    slots=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    block=st.sampled_from([1, 3, 8, 16, 64]),
    n=st.integers(1, 6),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_reference_is_the_equation(slots, block, n, softcap, seed):
    arrays, options = case(slots, block, n, size=16, seed=seed, softcap=softcap)
    out = sparse_decode_attention(*arrays, **options, impl="reference")
    assert tolerance.error(out, loops(*arrays, **options)) < 1e-4  # a logit near 0 loses digits


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("block", [1, 16])
def test_all_blocks_is_dense_attention(bits, block):
    slots = (96, 70)
    (q, k, v, mass, _), options = case(slots, block, 1)
    if bits < 16:
        k, v = (jnp.nan_to_num(x) for x in (k, v))
        k, v = quantize(k, bits, slots, 32), quantize(v, bits, slots, None)
    idx = jnp.arange(96 // block, dtype=jnp.int32)
    idx = jnp.stack([jnp.where(idx < -(-s // block), idx, -1) for s in slots])
    idx = jnp.broadcast_to(idx, (2, *idx.shape))
    out = sparse_decode_attention(q, k, v, mass, idx, **options, impl="reference")
    assert (
        tolerance.error(out, decode_attention(q, k, v, mass, form=options["form"], impl="reference")) < 1e-5
    )


@pytest.mark.parametrize("impl", ["reference", "gpu", "tpu"])
@pytest.mark.parametrize("block", [1, 16])  # on TPU rows are gathered, and blocks are fetched
def test_a_list_of_none_gives_nothing(impl, block):
    (q, k, v, mass, idx), options = case((64, 64), block, 3, batch=1, size=128)
    idx = idx.at[0, 1].set(-1)
    with aim(INTERPRETED.get(impl, Target("cpu", "cpu"))):
        out, lse = sparse_decode_attention(q, k, v, mass, idx, **options, impl=impl)
    assert not np.isnan(out).any()
    assert not np.any(out[0, 1])
    assert np.all(np.isneginf(lse[0, 1]))
    assert np.all(np.isfinite(lse[0, 0]))


@pytest.mark.parametrize(
    ("impl", "block", "settings"),
    [
        ("gpu", 16, gpu.Settings(tile=32, programs=1)),
        ("gpu", 1, gpu.Settings(tile=16, programs=8)),
        ("tpu", 16, tpu.Settings(tile=128)),
        ("tpu", 64, tpu.Settings(tile=128)),
    ],
)
def test_lists_of_several_tiles(impl, block, settings):
    arrays, options = case((512, 256, 128), block, 320 // block, group=1, size=128)  # 2.5 tiles of 128
    expected = sparse_decode_attention(*arrays, **options, impl="reference")
    with aim(INTERPRETED[impl]), tuning.force("sparse_decode_attention", settings):
        out = sparse_decode_attention(*arrays, **options, impl=impl)
    assert not backend.races()
    assert tolerance.error(out, expected) < 1e-5


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("block", [1, 16, 200])
def test_reference_moves_chosen_blocks_from_host_memory(bits, block):
    (q, k, v, mass, idx), options = case((96, 70), block, 5)
    if bits < 16:
        k, v = (jnp.nan_to_num(x) for x in (k, v))
        k, v = quantize(k, bits, (96, 70), 32), quantize(v, bits, (96, 70), None)
    run = functools.partial(sparse_decode_attention, **options, impl="reference")
    expected = run(q, k, v, mass, idx)
    k, v = jax.device_put((k, v), HOST)
    for call in (run, jax.jit(run)):
        out = call(q, k, v, mass, idx)
        assert jax.typeof(out[0]).memory_space == jax.memory.Space.Device
        assert tolerance.error(out, expected) < 1e-6
    moved = [
        e.invars[0].aval.shape for e in equations(jax.make_jaxpr(run)(q, k, v, mass, idx).jaxpr, "device_put")
    ]
    assert moved
    assert all(shape[0] <= -(-block // 32) * 32 + 32 for shape in moved)


def equations(jaxpr, name):
    """Yields the equations of a primitive, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr, name)


def test_gpu_kernel_takes_host_arrays_as_they_are():
    (q, k, v, mass, idx), options = case((96, 70), 16, 5, dtype="bfloat16")
    run = functools.partial(sparse_decode_attention, **options, impl="gpu")
    for place in (jax.memory.Space.Device, HOST):
        placed = jax.device_put((k, v), place)
        with aim(Target("gpu", "NVIDIA H100 80GB HBM3")), tuning.watch() as taken:
            jaxpr = jax.make_jaxpr(run)(q, *placed, mass, idx).jaxpr
        _, key = taken["sparse_decode_attention"]
        assert key["memory"] == place.name.lower()
        (op,) = (e for e in jaxpr.eqns if set(jaxpr.invars[1:3]) & set(e.invars))
        inside = op.params["jaxpr"].jaxpr
        for i in map(op.invars.index, jaxpr.invars[1:3]):
            var = inside.invars[i]
            assert {e.primitive.name for e in inside.eqns if var in e.invars} == {"pallas_call"}


def test_tpu_kernel_refuses_host_arrays():
    (q, k, v, mass, idx), options = case((96, 70), 16, 5)
    k, v = jax.device_put((k, v), HOST)
    with aim(INTERPRETED["tpu"]), pytest.raises(NotImplementedError, match="pieces of 4 KiB"):
        sparse_decode_attention(q, k, v, mass, idx, **options, impl="tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "at least one slot, got block=0"),
        ({"idx": jnp.zeros((2, 1, 3), jnp.int32)}, r"per row and KV head, got idx.shape=\(2, 1, 3\)"),
        ({"idx": jnp.zeros((2, 2, 0), jnp.int32)}, r"one block or more"),
        ({"mass": jnp.ones((2, 100))}, "one mass per slot"),
    ],
)
def test_refuses_what_disagrees(change, message):
    arrays, options = case((96, 70), 16, 3)
    given = dict(zip(("q", "k", "v", "mass", "idx"), arrays, strict=True)) | options | change
    plain = inspect.unwrap(
        sparse_decode_attention
    )  # before the check of annotations, which sees shapes first
    with pytest.raises(ValueError, match=message):
        plain(**given)


def test_refuses_a_mass_in_host_memory():
    (q, k, v, mass, idx), options = case((96, 70), 16, 3)
    with pytest.raises(ValueError, match="only k and v may lie in host memory, got mass there"):
        sparse_decode_attention(q, k, v, jax.device_put(mass, HOST), idx, **options)


@pytest.mark.parametrize("index", [-2, 5, 6])  # heads of 6 and 5 blocks
def test_debug_mode_finds_an_index_of_no_block(index):
    (q, k, v, mass, idx), options = case((96, 70), 16, 3)
    run = checked(functools.partial(sparse_decode_attention, **options, impl="reference"))
    run(q, k, v, mass, idx)
    with pytest.raises(ValueError, match="an index is a block of its head"):
        run(q, k, v, mass, idx.at[1, 1, 2].set(index))


def test_gpu_kernel_refuses_other_types():
    (q, k, v, mass, idx), options = case((96, 70), 16, 3)
    with aim(INTERPRETED["gpu"]), pytest.raises(NotImplementedError, match="have the type of q"):
        sparse_decode_attention(q, k.astype(jnp.bfloat16), v, mass, idx, **options, impl="gpu")


def test_bytes_of_a_spec_are_those_of_the_rows_chosen():
    spec = SparseSpec(8, 4, 128, (32768,) * 8, 16, 256)
    assert spec.bytes() == 8 * 8 * 256 * (16 * (2 * 256 + 4) + 4)
