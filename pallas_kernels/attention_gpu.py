"""What the attention kernels in Pallas Triton share: rows of a store, online softmax, the join of splits.

Logits are in base 2. Arrays in Triton have sizes of powers of two: X pads G, E2 pads the channels.
With 4-bit codes a row has two parts, the channels in the low and in the high halves of its bytes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import AttentionForm, Codes, starts
from pallas_kernels.backend import gpu_call, pl, program_id, target, triton

__all__ = [
    "check",
    "fold",
    "join_splits",
    "load_queries",
    "load_rows",
    "n_parts",
    "nothing",
    "part_queries",
    "part_shapes",
    "store_kind",
    "store_split",
    "walk",
]

_LOWEST = -1e30  # below every logit, and finite: differences of two stay numbers
_LOG2E = 1.4426950408889634


def check(q: Any, k: Any, v: Any) -> None:
    """Raises NotImplementedError for types and head sizes that the kernels do not take."""
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {q.dtype=}")
    if not 16 <= q.shape[-1] <= 256:
        raise NotImplementedError(f"the kernel takes head sizes from 16 to 256, got D={q.shape[-1]}")
    for store in (k, v):
        rows = store.codes if isinstance(store, Codes) else store
        if rows.size >= 2**31:
            raise NotImplementedError(
                f"the kernel addresses 2^31 elements, got {rows.shape} in one array: use fewer rows a batch"
            )
        if not isinstance(store, Codes) and store.dtype != q.dtype:
            raise NotImplementedError(f"k and v have the type of q, got {store.dtype} for {q.dtype}")


def store_kind(store: Any) -> str:
    """Returns the word for a store's elements in keys of settings."""
    return f"int{store.bits}" if isinstance(store, Codes) else str(store.dtype)


def n_parts(store: Any) -> int:
    """Returns how many channels a stored element holds."""
    return 8 // store.bits if isinstance(store, Codes) else 1


def part_queries(q: jax.Array, k: Any) -> jax.Array:
    """Returns q as [B K G E parts]: the channels of one byte of k lie together."""
    return q.reshape(*q.shape[:3], q.shape[3] // n_parts(k), n_parts(k))


def part_shapes(q: Any, v: Any, n_splits: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the shapes of what splits give: sums of weighted values, largest logits, sums of weights.

    n_splits: of all heads together, I.
    """
    batch, _, group, size = q.shape
    shape, parts = (batch, n_splits, group), n_parts(v)
    return tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*shape, size // parts, parts), shape, shape))


def load_queries(q_ref: Any, batch: jax.Array, head: jax.Array) -> list[jax.Array]:
    """Loads the parts [X E2] of one head's queries."""
    group, width, parts = q_ref.shape[2:]
    g, e = jnp.arange(_lanes(group)), jnp.arange(_lanes(width))
    mask = (g < group)[:, None] & (e < width)[None, :]
    return [
        triton.load(q_ref.at[batch, head, g[:, None], e[None, :], i], mask=mask, other=0)
        for i in range(parts)
    ]


def load_rows(store: Any, place: tuple, alive: jax.Array, dtype: Any) -> list[jax.Array]:
    """Loads rows of a store as its parts, each [P E2].

    Codes become float16, whose 11 bits hold them and which a byte becomes in one instruction; with
    float32 queries they become float32.

    place: batch row, packed rows [P], and the block of scales of each [P] or of the first, where
    rows follow each other. alive: [P], rows to load; the others are zeros.
    """
    batch, row, code_block = place
    codes = store.codes if isinstance(store, Codes) else store
    channel = jnp.arange(_lanes(codes.shape[-1]))
    mask = alive[:, None] & (channel < codes.shape[-1])[None, :]
    if not isinstance(store, Codes):
        return [triton.load(codes.at[batch, row[:, None], channel[None, :]], mask=mask, other=0)]
    dtype = jnp.float32 if dtype == jnp.float32 else jnp.float16
    # In blocks [N P E2]: to flatten them comes after decoding, else the compiler would move bytes, one by
    # one, to where the matrix units want their factors.
    per = store.block if store.block is not None and not code_block.ndim else row.shape[0] // 2
    n = row.shape[0] // per
    row, alive = row.reshape(n, per), alive.reshape(n, per)
    mask = mask.reshape(n, per, channel.size)
    x = triton.load(codes.at[batch, row[:, :, None], channel[None, None, :]], mask=mask, other=0)
    place = (batch, row, code_block if not code_block.ndim else code_block.reshape(n, per))
    scales, zeros = (_scales(store, ref, place, alive, dtype) for ref in (store.scale, store.zero))
    return [
        _decode(x, store.bits, i, scale, zero).reshape(n * per, -1)
        for i, (scale, zero) in enumerate(zip(scales, zeros, strict=True))
    ]


def _scales(store: Codes, ref: Any, place: tuple, alive: jax.Array, dtype: Any) -> list[jax.Array]:
    """Loads scales, or zeros, for the parts of rows [N P], as [N P 1], [N 1 E2] or [N P E2]."""
    batch, row, code_block = place
    parts, width = n_parts(store), store.codes.shape[-1]
    if store.block is None:
        x = triton.load(ref.at[batch, row, 0], mask=alive, other=0)
        return [x.astype(dtype)[:, :, None]] * parts
    channel = jnp.arange(_lanes(width))
    if code_block.ndim:  # rows from anywhere
        mask = alive[:, :, None] & (channel < width)[None, None, :]
        at = [(batch, code_block[:, :, None], (channel * parts + j)[None, None, :]) for j in range(parts)]
        return [triton.load(ref.at[x], mask=mask, other=0).astype(dtype) for x in at]
    block = jnp.arange(row.shape[0])
    here = jnp.max(jnp.where(alive, 1, 0), axis=1) > 0
    mask = here[:, None, None] & (channel < width)[None, :, None]
    part = jnp.arange(parts)
    at = (channel * parts)[None, :, None] + part[None, None, :]
    x = triton.load(ref.at[batch, (code_block + block)[:, None, None], at], mask=mask, other=0)  # as it lies
    each = [jnp.sum(jnp.where(part == j, x.astype(jnp.float32), 0.0), axis=2) for j in range(parts)]
    return [y.astype(dtype)[:, None] for y in each]


# Four bytes of codes, with scales and zeros of each, become float16: a code in the low bits of 1024, less 1024.
_DECODE = """{
    .reg .b32 code, one;
    mov.b32 one, 0x64006400;
    %s
    prmt.b32 $0, code, one, 0x5150;
    prmt.b32 $1, code, one, 0x5352;
    sub.f16x2 $0, $0, one;
    sub.f16x2 $1, $1, one;
    fma.rn.f16x2 $0, $0, $3, $5;
    fma.rn.f16x2 $1, $1, $4, $6;
}"""
_PICK = {  # by bits and part
    (8, 0): "mov.b32 code, $2;",
    (4, 0): "and.b32 code, $2, 0x0f0f0f0f;",
    (4, 1): "shr.u32 code, $2, 4; and.b32 code, code, 0x0f0f0f0f;",
}


def _decode(byte: jax.Array, bits: int, part: int, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Returns code * scale + zero, of all bits or of those in one half of a byte."""
    if scale.dtype == jnp.float32 or target().interpret is not None:
        code = byte if bits == 8 else byte >> 4 if part else byte & 15
        return code.astype(scale.dtype) * scale + zero
    scale, zero = (jnp.broadcast_to(x, byte.shape) for x in (scale, zero))
    (out,) = triton.elementwise_inline_asm(
        _DECODE % _PICK[bits, part], args=[byte, scale, zero], constraints="=&r,=&r,r,r,r,r,r", pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(byte.shape, scale.dtype)],
    )  # fmt: skip
    return out


def nothing(out_ref: Any) -> tuple:
    """Returns the state of softmax before the first tile: largest logit, sum of weights, parts of the sum."""
    group, width, parts = out_ref.shape[2:]
    rows = _lanes(group)
    out = tuple(jnp.zeros((rows, _lanes(width)), jnp.float32) for _ in range(parts))
    return jnp.full((rows,), _LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), out


def fold(
    state: tuple,
    q: list[jax.Array],
    keys: list[jax.Array],
    values: list[jax.Array],
    mass: jax.Array,
    form: AttentionForm,
    factor: float,
) -> tuple:
    """Takes one tile of P slots into the state of softmax.

    keys, values: the parts of the rows [P E2]; values of slots without mass are finite.
    """
    top, total, out = state
    logit = sum(_dot(part, key.T) for part, key in zip(q, keys, strict=True))
    scale = factor * _LOG2E
    if form.softcap is not None:  # tanh(x) = 1 - 2/(1 + exp 2x)
        logit = 1 - 2 / (1 + _exp2(logit * (2 * scale / form.softcap)))
        scale = form.softcap * _LOG2E
    logit = logit * scale + _log2(jnp.maximum(mass, 1e-30))[None, :]
    logit = jnp.where((mass > 0)[None, :], logit, 2 * _LOWEST)  # [X P]
    new = jnp.maximum(top, jnp.max(logit, axis=1))
    p, old = _exp2(logit - new[:, None]), _exp2(top - new)
    total = total * old + jnp.sum(p, axis=1)
    out = tuple(part * old[:, None] + _dot(p, value) for part, value in zip(out, values, strict=True))
    return new, total, out


def walk(n_steps: jax.Array, load: Callable[[jax.Array], tuple], use: Callable, state: Any, ahead: bool):
    """Returns the state after use(state, load(i)) for every step i.

    ahead: what a step loads is used in the next one. The compiler moves rows to the matrix units
    while they are loaded, which for codes it does byte by byte; what a loop carries it moves whole.
    """
    if not ahead:
        return jax.lax.fori_loop(0, n_steps, lambda i, state: use(state, load(i)), state)

    def step(i, carry):
        state, tile = carry
        after = load(i + 1)
        return use(state, tile), after

    return jax.lax.fori_loop(0, n_steps, step, (state, load(0)))[0]


def store_split(state: tuple, batch: jax.Array, item: jax.Array, refs: tuple) -> None:
    """Stores the state of one split in the refs of `part_shapes`."""
    out_ref, top_ref, total_ref = refs
    group, width = out_ref.shape[2:4]
    top, total, out = state
    g, e = jnp.arange(_lanes(group)), jnp.arange(_lanes(width))
    triton.store(top_ref.at[batch, item, g], top, mask=g < group)
    triton.store(total_ref.at[batch, item, g], total, mask=g < group)
    mask = (g < group)[:, None] & (e < width)[None, :]
    for j, part in enumerate(out):
        triton.store(out_ref.at[batch, item, g[:, None], e[None, :], j], part, mask=mask)


def join_splits(parts: tuple, counts: np.ndarray, q: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B K G D], of q's type, and the natural log-sum-exp [B K G].

    parts: what the splits stored. counts: [K] splits of each head, which lie one after the other.
    """
    out, top, total = parts
    n_most = int(counts.max())
    spans = np.stack([starts(tuple(counts.tolist()))[:-1], counts], axis=1).astype(np.int32)
    return gpu_call(
        functools.partial(_join, n_most=n_most),
        jnp.asarray(spans), out.reshape(*top.shape, q.shape[-1]), top, total,
        grid=q.shape[:3],
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)),
        warps=4, stages=1, name=f"{name}_join",
    )  # fmt: skip


def _join(
    spans_ref,  # [K 2] first item of the head, number of items
    part_ref,  # [B I G D] sums of weighted values
    top_ref,  # [B I G]
    total_ref,  # [B I G]
    out_ref,  # [B K G D]
    lse_ref,  # [B K G]
    *,
    n_most: int,
):
    """Joins the splits of one query head."""
    batch, head, g = program_id(0), program_id(1), program_id(2)
    first, n = spans_ref[head, 0], spans_ref[head, 1]
    size = out_ref.shape[-1]
    step_size, lanes = 16, _lanes(size)
    item, d = jnp.arange(_lanes(n_most)), jnp.arange(lanes)
    top = triton.load(top_ref.at[batch, first + item, g], mask=item < n, other=_LOWEST)
    most = jnp.max(top, axis=0)
    weight = jnp.exp2(top - most)
    total = jnp.sum(
        weight * triton.load(total_ref.at[batch, first + item, g], mask=item < n, other=0.0), axis=0
    )

    def step(i, out):
        at = i * step_size + jnp.arange(step_size)
        top = triton.load(top_ref.at[batch, first + at, g], mask=at < n, other=_LOWEST)
        mask = (at < n)[:, None] & (d < size)[None, :]
        part = triton.load(part_ref.at[batch, (first + at)[:, None], g, d[None, :]], mask=mask, other=0.0)
        return out + jnp.sum(jnp.exp2(top - most)[:, None] * part, axis=0)

    out = jax.lax.fori_loop(0, (n + step_size - 1) // step_size, step, jnp.zeros((lanes,), jnp.float32))
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
    triton.store(out_ref.at[batch, head, g, d], out.astype(out_ref.dtype), mask=d < size)
    lse = jnp.where(total > 0, (most + jnp.log2(jnp.maximum(total, 1e-30))) / _LOG2E, -jnp.inf)
    lse_ref[batch, head, g] = lse


def _lanes(n: int) -> int:
    return max(16, pl.next_power_of_2(n))


def _exp2(x):
    return _fast("ex2.approx.ftz.f32", jnp.exp2, x)


def _log2(x):
    return _fast("lg2.approx.ftz.f32", jnp.log2, x)


def _fast(instruction: str, plain: Callable, x: jax.Array) -> jax.Array:
    """Returns a function of x by one instruction, right to 2 ulp, where the library's takes twenty."""
    if target().interpret is not None:
        return plain(x)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    options = {"constraints": "=f,f", "pack": 1, "result_shape_dtypes": [shape]}
    return triton.elementwise_inline_asm(f"{instruction} $0, $1;", args=[x], **options)[0]


def _dot(a, b):
    """Returns a·b in float32, of factors of b's type."""
    exact = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jnp.dot(a.astype(b.dtype), b, precision=exact, preferred_element_type=jnp.float32)
