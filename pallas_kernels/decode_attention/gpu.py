"""Decode attention in Pallas Triton: splits of the slots, then a join of the splits.

Every program reads one split of one head's slots; splits of a layer are equal whatever the heads'
capacities, so ragged heads balance. Logits are in base 2. Partial results [B I ...] are joined by
a second kernel. Arrays in Triton have sizes of powers of two: X pads G, E2 pads the channels.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.attention import AttentionForm, Codes, starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton

__all__ = ["Settings", "run"]

_LOWEST = -1e30  # below every logit, and finite: differences of two stay numbers
_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Settings:
    """block: slots per step of the loop. programs: wanted in all, which sets the split."""

    block: int = 64
    programs: int = 1056
    warps: int = 4
    stages: int = 3


def run(q, k, v, mass, length, *, form: AttentionForm):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types, head sizes or blocks of codes that the kernel does not take.
    """
    batch, n_heads, group, size = q.shape
    _check(q, k, v)
    chosen = tuning.settings(
        "decode_attention",
        Settings(),
        dtype=_dtype(k),
        head_dim=size,
        group=group,
        rows=batch * sum(form.slots),
    )
    blocks = [s.block for s in (k, v) if isinstance(s, Codes) and s.block]
    block = blocks[0] if blocks else chosen.block
    split = max(block, -(-batch * sum(form.slots) // chosen.programs // block) * block)
    items = _items(form.slots, split, block)
    k_parts, v_parts = (2 if isinstance(s, Codes) and s.bits == 4 else 1 for s in (k, v))
    queries = q.reshape(batch, n_heads, group, size // k_parts, k_parts)  # channels of one byte lie together
    part = (batch, len(items), group)
    out, top, total = gpu_call(
        functools.partial(_split, form=form, block=block, factor=form.factor(size)),
        jnp.asarray(items), length, queries, k, v, mass,
        grid=(batch, len(items)),
        out_shape=(
            jax.ShapeDtypeStruct((*part, size // v_parts, v_parts), jnp.float32),
            jax.ShapeDtypeStruct(part, jnp.float32),
            jax.ShapeDtypeStruct(part, jnp.float32),
        ),
        warps=chosen.warps, stages=chosen.stages, name="decode_attention",
    )  # fmt: skip
    counts = np.bincount(items[:, 0], minlength=n_heads).astype(np.int32)
    spans = np.stack(
        [starts(tuple(counts.tolist()))[:-1], counts], axis=1
    )  # [K 2] first item and number of items
    out, lse = gpu_call(
        functools.partial(_join, n_most=int(counts.max())),
        jnp.asarray(spans), out.reshape(*part, size), top, total,
        grid=(batch, n_heads, group),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)),
        warps=4, stages=1, name="decode_attention_join",
    )  # fmt: skip
    return (out, lse) if form.lse else out


def _check(q, k, v) -> None:
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {q.dtype=}")
    if not 32 <= q.shape[-1] <= 256:
        raise NotImplementedError(f"the kernel takes head sizes from 32 to 256, got D={q.shape[-1]}")
    for store in (k, v):
        if isinstance(store, Codes):
            block = store.block or 32
            if block not in (16, 32, 64, 128):
                raise NotImplementedError(
                    f"the kernel takes codes in blocks of 16 to 128, a power of 2, got {block=}"
                )
        elif store.dtype != q.dtype:
            raise NotImplementedError(f"k and v have the type of q, got {store.dtype} for {q.dtype}")
    if all(isinstance(s, Codes) and s.block for s in (k, v)) and k.block != v.block:
        raise NotImplementedError(f"keys and values share their block, got {k.block} and {v.block}")


def _dtype(k) -> str:
    return f"int{k.bits}" if isinstance(k, Codes) else str(k.dtype)


def _items(slots: tuple[int, ...], split: int, block: int) -> np.ndarray:
    """Returns the work [I 5]: head, first slot, its packed row, its block of scales, slots."""
    first, first_block = starts(slots), starts(tuple(-(-size // block) for size in slots))
    return np.array(
        [
            (head, at, first[head] + at, first_block[head] + at // block, min(split, size - at))
            for head, size in enumerate(slots)
            for at in range(0, size, split)
        ],
        np.int32,
    )


def _lanes(n: int) -> int:
    return max(16, pl.next_power_of_2(n))


def _rows(store, part: int, place: tuple, alive, dtype):
    """Loads rows of a store as [P E2]: all its channels, or those in one half of its bytes.

    place: batch row, first packed row, block of scales. alive: [P], rows to load.
    """
    batch, row, code_block = place
    codes = store.codes if isinstance(store, Codes) else store
    width = codes.shape[-1]
    n, lanes = alive.shape[0], _lanes(width)
    channel = jnp.arange(lanes)
    mask = alive[:, None] & (channel < width)[None, :]
    at = row + jnp.arange(n)
    x = triton.load(codes.at[batch, at[:, None], channel[None, :]], mask=mask, other=0)
    if not isinstance(store, Codes):
        return x
    if store.bits == 4:
        x = (x >> 4) if part else (x & 15)
    if store.block is None:
        at, mask = (batch, at, 0), alive
    else:
        at, mask = (batch, code_block, channel * (8 // store.bits) + part), channel < width
    scale, zero = (
        triton.load(r.at[at], mask=mask, other=0).astype(jnp.float32) for r in (store.scale, store.zero)
    )
    if store.block is None:
        scale, zero = scale[:, None], zero[:, None]
    else:
        scale, zero = scale[None, :], zero[None, :]
    return (x.astype(jnp.float32) * scale + zero).astype(dtype)


def _dot(a, b, dtype):
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _split(
    items_ref,  # [I 5] head, first slot, its row, its block of scales, slots
    length_ref,  # [B K]
    q_ref,  # [B K G E parts]
    k_ref,  # [B R E], or codes
    v_ref,  # [B R E], or codes
    mass_ref,  # [B R]
    out_ref,  # [B I G E parts] sum of weighted values
    top_ref,  # [B I G] largest logit, base 2
    total_ref,  # [B I G] sum of weights
    *,
    form: AttentionForm,
    block: int,  # P
    factor: float,
):
    """Attends over one split of one head's slots."""
    batch, item = program_id(0), program_id(1)
    head, first, row, code_block = (items_ref[item, i] for i in range(4))
    group, width, k_parts = q_ref.shape[2:]
    v_width, v_parts = out_ref.shape[3:]
    lanes, v_lanes, rows = _lanes(width), _lanes(v_width), _lanes(group)
    dtype = q_ref.dtype
    g, e = jnp.arange(rows), jnp.arange(lanes)
    mask = (g < group)[:, None] & (e < width)[None, :]
    q = [
        triton.load(q_ref.at[batch, head, g[:, None], e[None, :], i], mask=mask, other=0)
        for i in range(k_parts)
    ]
    n = jnp.clip(length_ref[batch, head] - first, 0, items_ref[item, 4])

    def step(i, carry):
        top, total, out = carry
        place = (batch, row + i * block, code_block + i)
        alive = i * block + jnp.arange(block) < n
        m = triton.load(mass_ref.at[batch, place[1] + jnp.arange(block)], mask=alive, other=0)
        logit = (
            sum(_dot(q[j], _rows(k_ref, j, place, alive, dtype).T, dtype) for j in range(k_parts)) * factor
        )
        if form.softcap is not None:  # tanh(x) = 1 - 2/(1 + exp 2x)
            tanh = 1 - 2 / (1 + jnp.exp2(logit * (2 * _LOG2E / form.softcap)))
            logit = form.softcap * tanh
        logit = logit * _LOG2E + jnp.log2(jnp.maximum(m, 1e-30))[None, :]
        logit = jnp.where((m > 0)[None, :], logit, _LOWEST)  # [X P]
        new = jnp.maximum(top, jnp.max(logit, axis=1))
        p = jnp.where((m > 0)[None, :], jnp.exp2(logit - new[:, None]), 0.0)
        old = jnp.exp2(top - new)
        total = total * old + jnp.sum(p, axis=1)
        next_out = []
        for j in range(v_parts):
            value = _rows(v_ref, j, place, alive & (m > 0), dtype)  # a slot of no mass may hold NaN
            next_out.append(out[j] * old[:, None] + _dot(p.astype(dtype), value, dtype))
        return new, total, tuple(next_out)

    empty = tuple(jnp.zeros((rows, v_lanes), jnp.float32) for _ in range(v_parts))
    carry = (jnp.full((rows,), _LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), empty)
    top, total, out = jax.lax.fori_loop(0, (n + block - 1) // block, step, carry)
    triton.store(top_ref.at[batch, item, g], top, mask=g < group)
    triton.store(total_ref.at[batch, item, g], total, mask=g < group)
    e = jnp.arange(v_lanes)
    mask = (g < group)[:, None] & (e < v_width)[None, :]
    for j in range(v_parts):
        triton.store(out_ref.at[batch, item, g[:, None], e[None, :], j], out[j], mask=mask)


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
