"""Decode attention in Pallas Mosaic: one pass over blocks of the packed axis, head after head.

A static list of (head, block) pairs is the sequential axis of the grid; blocks lie on multiples of
their size, so one that two heads share is visited twice and read once. The state of the online
softmax, in base 2, stays in VMEM from a head's first block to its last.

XLA keeps an array whose last axis fills no 128 lanes with the axis before it along the lanes. Such
an operand is handed over turned, [B D R] for [B R D]: no copy then, and no padding.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.attention import AttentionForm, Codes, starts
from pallas_kernels.backend import pl, pltpu, tpu_call

__all__ = ["Settings", "run", "vmem_bytes"]

_LANES = 128
_LOWEST = -1e30  # below every logit, and finite: differences of two stay numbers
_LOG2E = 1.4426950408889634
_VMEM_LIMIT = 16 * 2**20  # what v4, v5e and v5p give a kernel by default; later ones give more


@dataclass(frozen=True)
class Settings:
    """block: slots per step, at most; a multiple of 128."""

    block: int = 2048


def run(q, k, v, mass, length, *, form: AttentionForm):
    """Returns what `reference.run` returns.

    float16, which these chips lack, is decoded in the kernel and multiplied as float32; its
    subnormal numbers count as 0.

    Raises:
        NotImplementedError: for types, head sizes or layouts of codes that the kernel does not take.
    """
    _check(q, k, v, form)
    batch, n_heads, group, size = q.shape
    dtype = jnp.float32 if q.dtype == jnp.float16 else q.dtype
    chosen = tuning.settings(
        "decode_attention",
        Settings(4096 if isinstance(k, Codes) else 2048),  # 1 MiB of bfloat16 or int8 at D = 128
        dtype=f"int{k.bits}" if isinstance(k, Codes) else str(k.dtype),
        head_dim=size,
        group=group,
        rows=batch * sum(form.slots),
    )
    block = _fit(chosen.block, q, k, v, sum(form.slots))
    items, first = _items(form.slots, block), starts(form.slots)[:-1]
    stop = first + jnp.clip(length, 0, np.asarray(form.slots, np.int32))

    def place(b, i, items_ref, stop_ref):  # past a head's last live block: that again, so no read
        last = jnp.maximum(stop_ref[b * n_heads + items_ref[0, i]] - 1, items_ref[2, i])
        return jnp.minimum(items_ref[1, i], jax.lax.div(last, block))

    def spec(width, n):
        if _turned(width):
            return pl.BlockSpec((1, width, n), lambda *at: (at[0], 0, place(*at)))
        return pl.BlockSpec((1, n, width), lambda *at: (at[0], place(*at), 0))

    def head(width):
        return pl.BlockSpec((1, 1, group, width), lambda b, i, items_ref, _: (b, items_ref[0, i], 0, 0))

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, items.shape[1]),
        in_specs=[head(size), _specs(k, size, block, spec), _specs(v, size, block, spec), spec(1, block)],
        out_specs=[head(size), head(1)],
        scratch_shapes=[pltpu.VMEM((group, n), jnp.float32) for n in (1, 1, size)],
    )
    out, lse = tpu_call(
        functools.partial(_kernel, form=form, n_heads=n_heads),
        jnp.asarray(items), stop.reshape(-1).astype(jnp.int32),
        q.astype(dtype), _operand(k), _operand(v), mass.astype(jnp.float32)[:, None],
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32),
        ],
        semantics=("parallel", "arbitrary"),
        vmem_bytes=_VMEM_LIMIT, name="decode_attention",
    )  # fmt: skip
    out = out.astype(q.dtype)
    return (out, lse[..., 0]) if form.lse else out


def _check(q, k, v, form: AttentionForm) -> None:
    pass


def _fit(block, q, k, v, rows):
    unit = _LANES
    for store in (k, v):
        if isinstance(store, Codes) and store.block:
            unit = max(unit, store.block * (_LANES if _turned(q.shape[-1]) else 16))
    most = -(-rows // unit) * unit
    return max(unit, min(block, most) // unit * unit)


def vmem_bytes():
    pass


def _turned(width: int) -> bool:
    """Returns whether slots lie along the lanes in an array of that width."""
    return width % _LANES != 0


def _specs(store, size: int, block: int, spec):
    """Returns the blocks of a store."""
    if not isinstance(store, Codes):
        return spec(size, block)
    scale = spec(1, block) if store.block is None else spec(size, block // store.block)
    return Codes(spec(size * store.bits // 8, block), scale, scale, store.bits, store.block)


def _operand(store):
    """Returns a store as the kernel reads it."""

    def turn(x):
        return x.swapaxes(1, 2) if _turned(x.shape[-1]) else x

    if isinstance(store, Codes):
        scale, zero = (
            turn(x.astype(jnp.float32) if x.dtype == jnp.float16 else x) for x in (store.scale, store.zero)
        )
        return store.replace(codes=turn(store.codes), scale=scale, zero=zero)
    return turn(jax.lax.bitcast_convert_type(store, jnp.uint16) if store.dtype == jnp.float16 else store)


def _items(slots: tuple[int, ...], block: int) -> np.ndarray:
    """Returns the work [5 I]: head, block, the head's first row, whether it begins, whether it ends."""
    first = starts(slots).tolist()
    return np.array(
        [
            (head, at, row, at == row // block, at == (end - 1) // block)
            for head, (row, end) in enumerate(zip(first, first[1:], strict=False))
            for at in range(row // block, (end - 1) // block + 1)
        ],
        np.int32,
    ).T


def _dot(a, b, a_axis: int, b_axis: int):
    """Returns the product over an axis of each, in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _rows(ref, dtype):
    """Loads rows, [P D], or [D P] where turned."""
    x = ref[0]
    if x.dtype != jnp.uint16:
        return x
    bits = x.astype(jnp.int32)  # float16: move the exponent to float32's place, then mend its bias
    inf = jnp.where((bits & 0x7C00) == 0x7C00, 0x7F800000, 0)
    bits = ((bits & 0x8000) << 16) | ((bits & 0x7FFF) << 13) | inf
    return jax.lax.bitcast_convert_type(bits, jnp.float32) * 2.0**112


def _codes(store: Codes, turned: bool, dtype):
    """Loads codes less half their range, [P D] or [D P]; with 4 bits even channels come first."""
    words = pltpu.bitcast(store.codes[0], jnp.int32)  # four codes at once
    sign = jnp.int32(-0x7F7F7F80)  # 0x80 in each byte
    if store.bits == 8:
        parts = [words ^ sign]
    else:
        parts = [(((words >> shift) & 0x0F0F0F0F) + 0x78787878) ^ sign for shift in (0, 4)]
    parts = [pltpu.bitcast(part, jnp.int8) for part in parts]
    return jnp.concatenate(parts, axis=0 if turned else 1).astype(dtype)


def _evens_first(size: int, dtype):
    """Returns the matrix [D D] that moves even channels before odd ones: x @ matrix."""
    channel, at = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    half = size // 2
    return (channel == jnp.where(at < half, 2 * at, 2 * (at - half) + 1)).astype(dtype)


def _scales(store: Codes):
    """Loads scales and zeros, the zeros for codes less half their range: [1 P] per row, else as stored."""
    scale, zero = (ref[0].astype(jnp.float32) for ref in (store.scale, store.zero))
    return scale, zero + scale * 2 ** (store.bits - 1)


def _logits(q, store):
    """Returns q·k [G P]."""
    size = q.shape[1]
    if not isinstance(store, Codes):
        return _dot(q, _rows(store, q.dtype), 1, 0 if _turned(size) else 1)
    turned = _turned(size * store.bits // 8)
    codes = _codes(store, turned, q.dtype)
    scale, zero = _scales(store)
    wide = q.astype(jnp.float32)
    move = _evens_first(size, jnp.float32) if store.bits == 4 else None
    if store.block is None:
        moved = q if move is None else _dot(wide, move, 1, 0).astype(q.dtype)
        logit = _dot(moved, codes, 1, 0 if turned else 1)
        return logit * scale + jnp.sum(wide, axis=1, keepdims=True) * zero
    if _turned(size):
        scale, zero = scale.T, zero.T
    rest = _dot(wide, zero, 1, 1)  # [G N]
    moved = wide
    if move is not None:
        scale, moved = _dot(scale, move, 1, 0), _dot(wide, move, 1, 0)
    return _blocked(moved, codes, scale, rest, store.block, turned, q.dtype)


def _blocked(q, codes, scale, rest, block: int, turned: bool, dtype):
    """Returns Σ_d q·scale·code + rest [G P] with scales [N D] and rest [G N] per block of slots.

    Scales go into the queries, not the codes: 128 slots, the width of a product, meet the queries
    of all their blocks, and each slot picks its block's.
    """
    group, per = q.shape[0], _LANES // block
    part = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1), block)
    out = []
    for i in range(codes.shape[1 if turned else 0] // _LANES):
        at = slice(i * _LANES, (i + 1) * _LANES)
        scaled = jnp.concatenate([q * scale[i * per + j][None] for j in range(per)], axis=0)
        product = _dot(scaled.astype(dtype), codes[:, at] if turned else codes[at], 1, 0 if turned else 1)
        logit = jnp.zeros((group, _LANES), jnp.float32)
        for j in range(per):
            n = i * per + j
            logit = jnp.where(part == j, product[j * group : (j + 1) * group] + rest[:, n : n + 1], logit)
        out.append(logit)
    return jnp.concatenate(out, axis=1)


def _values(p, alive, store, size: int, dtype):
    """Returns Σ p·v [G D] over the slots alive; with 4 bits even channels come first."""
    if not isinstance(store, Codes):
        v = _rows(store, dtype)
        v = v if _turned(size) else v.T
        return _dot(p.astype(dtype), jnp.where(alive, v, 0), 1, 1)  # a dead slot may hold NaN
    turned = _turned(size * store.bits // 8)
    scale, zero = (jnp.where(alive, x, 0) for x in _scales(store))
    rest = jnp.sum(p * zero, axis=1, keepdims=True)
    return _dot((p * scale).astype(dtype), _codes(store, turned, dtype), 1, 1 if turned else 0) + rest


def _kernel(
    items_ref,  # [5 I] head, block, its first row, whether the head begins, whether it ends
    stop_ref,  # [B·K] where each head's live rows end
    q_ref,  # [1 1 G D]
    k_ref,  # [1 P D], turned [1 D P], or codes
    v_ref,  # as k_ref
    mass_ref,  # [1 1 P]
    out_ref,  # [1 1 G D]
    lse_ref,  # [1 1 G 1]
    top_ref,  # [G 1] scratch: the largest logit so far, base 2
    total_ref,  # [G 1] scratch: the sum of weights so far
    sum_ref,  # [G D] scratch: the sum of weighted values so far
    *,
    form: AttentionForm,
    n_heads: int,
):
    """Attends over one block of one head's slots."""
    item = pl.program_id(1)
    head, block, row, begins, ends = (items_ref[i, item] for i in range(5))
    stop = stop_ref[pl.program_id(0) * n_heads + head]
    size, n_slots, dtype = q_ref.shape[-1], mass_ref.shape[-1], q_ref.dtype

    @pl.when(begins == 1)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, _LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    @pl.when((block * n_slots < stop) & (row < stop))
    def _():
        at = block * n_slots + jax.lax.broadcasted_iota(jnp.int32, (1, n_slots), 1)
        mass = mass_ref[0]
        alive = (at >= row) & (at < stop) & (mass > 0)
        logit = _logits(q_ref[0, 0], k_ref) * form.factor(size)
        if form.softcap is not None:
            logit = form.softcap * jnp.tanh(logit / form.softcap)
        logit = logit * _LOG2E + jnp.log2(jnp.where(alive, mass, 1.0))
        logit = jnp.where(alive, logit, _LOWEST)
        top = jnp.maximum(top_ref[...], jnp.max(logit, axis=1, keepdims=True))
        p = jnp.where(alive, jnp.exp2(logit - top), 0.0)
        old = jnp.exp2(top_ref[...] - top)
        total_ref[...] = total_ref[...] * old + jnp.sum(p, axis=1, keepdims=True)
        sum_ref[...] = sum_ref[...] * old + _values(p, alive, v_ref, size, dtype)
        top_ref[...] = top

    @pl.when(ends == 1)
    def _():
        total, out = total_ref[...], sum_ref[...]
        if isinstance(v_ref, Codes) and v_ref.bits == 4:
            out = _dot(out, _evens_first(size, jnp.float32), 1, 1)
        some = total > 0
        out = jnp.where(some, out / jnp.where(some, total, 1.0), 0.0)
        out_ref[0, 0] = out.astype(out_ref.dtype)
        lse = (top_ref[...] + jnp.log2(jnp.where(some, total, 1.0))) / _LOG2E
        lse_ref[0, 0] = jnp.where(some, lse, -jnp.inf)
