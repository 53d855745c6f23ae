"""What the attention kernels in Pallas Triton share: queries, online softmax, the join of splits.

Logits are in base 2. Arrays in Triton have sizes of powers of two: X pads G, E2 pads the channels.
Queries and sums have the parts of the rows, see `rows_gpu`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import AttentionForm, Codes, starts
from pallas_kernels.backend import gpu_call, program_id, triton
from pallas_kernels.instructions import exp2, log2, multiply_add
from pallas_kernels.rows_gpu import decode_rows, lanes, n_parts

__all__ = [
    "attend",
    "check",
    "join_splits",
    "load_queries",
    "needed",
    "part_queries",
    "part_shapes",
    "store_split",
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


def part_queries(q: jax.Array, k: Any) -> jax.Array:
    """Returns q as [B K G E parts]: the channels of one byte of k lie together."""
    return q.reshape(*q.shape[:3], q.shape[3] // n_parts(k), n_parts(k))


def part_shapes(q: Any, v: Any, n_splits: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the shapes of what splits give: sums of weighted values, largest logits, sums of weights.

    With one split of each head there is nothing to join: then those of the output, and of the log-sum-exp.
    n_splits: of all heads together, I.
    """
    batch, n_heads, group, size = q.shape
    shape, parts = (batch, n_splits, group), n_parts(v)
    out = (*shape, size // parts, parts)
    if n_splits == n_heads:
        return jax.ShapeDtypeStruct(out, q.dtype), jax.ShapeDtypeStruct(shape, jnp.float32)
    return tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in (out, shape, shape))


def load_queries(q_ref: Any, batch: jax.Array, head: jax.Array) -> list[jax.Array]:
    """Loads the parts [X E2] of one head's queries."""
    group, width, parts = q_ref.shape[2:]
    g, e = jnp.arange(lanes(group)), jnp.arange(lanes(width))
    mask = (g < group)[:, None] & (e < width)[None, :]
    return [
        triton.load(q_ref.at[batch, head, g[:, None], e[None, :], i], mask=mask, other=0)
        for i in range(parts)
    ]


def _nothing(out_ref: Any) -> tuple:
    """Returns the state of softmax before the first tile: largest logit, sum of weights, parts of the sum."""
    group, width, parts = out_ref.shape[2:]
    rows = lanes(group)
    out = tuple(jnp.zeros((rows, lanes(width)), jnp.float32) for _ in range(parts))
    return jnp.full((rows,), _LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), out


def _fold(
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
        logit = 1 - 2 / (1 + exp2(logit * (2 * scale / form.softcap)))
        scale = form.softcap * _LOG2E
    logit = multiply_add(logit, jnp.float32(scale), log2(jnp.maximum(mass, 1e-30))[None, :])
    logit = jnp.where((mass > 0)[None, :], logit, 2 * _LOWEST)  # [X P]
    new = jnp.maximum(top, jnp.max(logit, axis=1))
    p, old = exp2(logit - new[:, None]), exp2(top - new)
    total = total * old + jnp.sum(p, axis=1)
    out = tuple(part * old[:, None] + _dot(p, value) for part, value in zip(out, values, strict=True))
    return new, total, out


def attend(
    n_steps: jax.Array,
    load: Callable[[jax.Array], tuple],
    stores: tuple[Any, Any],
    q: list[jax.Array],
    out_ref: Any,
    form: AttentionForm,
    factor: float,
) -> tuple:
    """Returns the state of softmax over the tiles of all steps.

    load: gives the keys and values of a step, as `load_rows` does, and their masses [P].
    """

    def use(state, tile):
        k, v, mass = tile
        keys = decode_rows(stores[0], k, None, q[0].dtype)
        values = decode_rows(stores[1], v, mass > 0, q[0].dtype)
        return _fold(state, q, keys, values, mass, form, factor)

    def ahead(i, carry):  # uses what the step before loaded
        state, tile = carry
        after = load(i + 1)
        return use(state, tile), after

    start = _nothing(out_ref)
    if not any(isinstance(store, Codes) for store in stores):
        return jax.lax.fori_loop(0, n_steps, lambda i, state: use(state, load(i)), start)
    # The compiler itself loads rows ahead, but in the order of the matrix units, which for codes is
    # byte by byte; what a loop carries it moves whole.
    return jax.lax.fori_loop(0, n_steps, ahead, (start, load(0)))[0]


def needed(store: Any, alive: jax.Array, mass: jax.Array) -> jax.Array:
    """Returns which values to load: rows may hold NaN where the mass is 0, codes need not wait for it."""
    return alive if isinstance(store, Codes) else mass > 0


def store_split(state: tuple, batch: jax.Array, item: jax.Array, refs: tuple) -> None:
    """Stores the state of one split in the refs of `part_shapes`."""
    out_ref, *rest = refs
    group, width = out_ref.shape[2:4]
    top, total, out = state
    if len(rest) == 1:
        out = [part / jnp.where(total > 0, total, 1.0)[:, None] for part in out]
        sums = (_log_sum(top, total),)
    else:
        sums = (top, total)
    g, e = jnp.arange(lanes(group)), jnp.arange(lanes(width))
    for ref, x in zip(rest, sums, strict=True):
        triton.store(ref.at[batch, item, g], x, mask=g < group)
    mask = (g < group)[:, None] & (e < width)[None, :]
    for j, part in enumerate(out):
        x = part.astype(out_ref.dtype)
        triton.store(out_ref.at[batch, item, g[:, None], e[None, :], j], x, mask=mask)


def _log_sum(top: jax.Array, total: jax.Array) -> jax.Array:
    """Returns the natural log-sum-exp of logits in base 2."""
    return jnp.where(total > 0, (top + jnp.log2(jnp.maximum(total, 1e-30))) / _LOG2E, -jnp.inf)


def join_splits(parts: tuple, counts: np.ndarray, q: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B K G D], of q's type, and the natural log-sum-exp [B K G].

    parts: what the splits stored. counts: [K] splits of each head, which lie one after the other.
    """
    if len(parts) == 2:
        return parts[0].reshape(q.shape), parts[1]
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
    step_size, width = min(64, lanes(n_most)), lanes(size)
    item, d = jnp.arange(lanes(n_most)), jnp.arange(width)
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

    out = jax.lax.fori_loop(0, (n + step_size - 1) // step_size, step, jnp.zeros((width,), jnp.float32))
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
    triton.store(out_ref.at[batch, head, g, d], out.astype(out_ref.dtype), mask=d < size)
    lse_ref[batch, head, g] = _log_sum(most, total)


def _dot(a, b):
    """Returns a·b in float32, of factors of b's type."""
    exact = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jnp.dot(a.astype(b.dtype), b, precision=exact, preferred_element_type=jnp.float32)
