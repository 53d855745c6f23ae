"""What the attention kernels in Pallas Triton share: queries, online softmax, the join of splits.

Logits are in base 2, and lie slots by queries, [P X]: the matrix units take 16 slots and 8 queries, few of
which are padding then. Arrays in Triton have sizes of powers of two: X pads G, E2 pads the channels.
Queries and sums have the parts of the rows, see `rows_gpu`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import AttentionForm, Codes, starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.instructions import exp2, log2, multiply_add
from pallas_kernels.rows_gpu import bare_rows, decode_rows, has_row_scales, lanes, n_parts

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
_FEW = 264  # programs: twice the multiprocessors of an H100
_GAIN = 128.0  # weights with a scale of codes in them are so much larger: float16 ends at 6e-8


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
    """Loads the parts [E2 X] of one head's queries."""
    group, width, parts = q_ref.shape[2:]
    g, e = jnp.arange(_columns(group)), jnp.arange(lanes(width))
    mask = (e < width)[:, None] & (g < group)[None, :]
    return [
        triton.load(q_ref.at[batch, head, g[None, :], e[:, None], i], mask=mask, other=0)
        for i in range(parts)
    ]


def _columns(group: int) -> int:
    """Returns the power of two that G queries are padded to, X: the matrix units take 8 columns at least."""
    return max(8, pl.next_power_of_2(group))


def _nothing(out_ref: Any, n_slots: int) -> tuple:
    """Returns the state of softmax before the first tile of P slots.

    These are the largest logit [X], sums [P X] of weights and of weights times zeros of codes, each over the
    slots at one place of their tile, and the parts of the sum of values [E2 X].
    """
    group, width, parts = out_ref.shape[2:]
    columns = _columns(group)
    out = tuple(jnp.zeros((lanes(width), columns), jnp.float32) for _ in range(parts))
    none = jnp.zeros((n_slots, columns), jnp.float32)
    return jnp.full((columns,), _LOWEST, jnp.float32), none, none, out


def _logits(
    q: list[jax.Array], keys: list[jax.Array], mass: jax.Array, form: AttentionForm, factor: float
) -> jax.Array:
    """Returns the logits [P X] of one tile, from the parts of the keys [P E2]."""
    logit = sum(_dot(key, part) for part, key in zip(q, keys, strict=True))
    scale = factor * _LOG2E
    if form.softcap is not None:  # tanh(x) = 1 - 2/(1 + exp 2x)
        logit = 1 - 2 / (1 + exp2(logit * (2 * scale / form.softcap)))
        scale = form.softcap * _LOG2E
    logit = multiply_add(logit, jnp.float32(scale), log2(jnp.maximum(mass, 1e-30))[:, None])
    return jnp.where((mass > 0)[:, None], logit, 2 * _LOWEST)


def _fold(state: tuple, logit: jax.Array, values: tuple[list[jax.Array], tuple | None]) -> tuple:
    """Takes one tile of P slots into the state of softmax.

    logit: [P X]. values: as of `bare_rows`; those of slots without mass are finite.
    """
    top, total, shift, out = state
    new = jnp.maximum(top, jnp.max(logit, axis=0))
    p, old = exp2(logit - new[None, :]), exp2(top - new)
    total = multiply_add(total, old[None, :], p)
    values, pair = values
    if pair is not None:
        scale, zero = pair
        shift = multiply_add(shift, old[None, :], p * zero[:, None])
        p = p * (_GAIN * scale)[:, None]
    out = tuple(part * old[None, :] + _dot(value.T, p) for part, value in zip(out, values, strict=True))
    return new, total, shift, out


def attend(
    n_steps: jax.Array,
    n_slots: int,
    load: tuple[Callable[..., tuple], Callable[..., tuple]],
    stores: tuple[Any, Any],
    q: list[jax.Array],
    out_ref: Any,
    form: AttentionForm,
    factor: float,
) -> tuple:
    """Returns the state of softmax over the tiles of all steps.

    n_slots: of a step, P. load: gives the keys of a step and their masses [P]; and its values, given the
    masses. Rows are as of `load_rows`.
    """
    load_keys, load_values = load

    def weigh(keys, mass):
        return _logits(q, decode_rows(stores[0], keys, None, q[0].dtype), mass, form, factor)

    def add(state, logit, values, mass):
        return _fold(state, logit, bare_rows(stores[1], values, mass > 0, q[0].dtype))

    def use(i, state):
        keys, mass = load_keys(i)
        values = load_values(i, mass)
        return add(state, weigh(keys, mass), values, mass)

    def ahead(i, carry):  # uses what the step before loaded, and loads for the next one in its place
        state, keys, values, mass = carry
        logit = weigh(keys, mass)
        keys, after = load_keys(i + 1)
        state = add(state, logit, values, mass)
        return state, keys, load_values(i + 1, after), after

    start = _nothing(out_ref, n_slots)
    if not any(isinstance(store, Codes) for store in stores):
        state = jax.lax.fori_loop(0, n_steps, use, start)
    else:
        # The compiler itself loads rows ahead, but in the order of the matrix units, which for codes is
        # byte by byte; what a loop carries it moves whole.
        keys, mass = load_keys(0)
        state = jax.lax.fori_loop(0, n_steps, ahead, (start, keys, load_values(0, mass), mass))[0]
    top, total, shift, out = state
    total, shift = jnp.sum(total, axis=0), jnp.sum(shift, axis=0)
    if has_row_scales(stores[1]):
        out = tuple(part / _GAIN + shift[None, :] for part in out)
    return top, total, out


def needed(store: Any, alive: jax.Array) -> jax.Array | None:
    """Returns which rows to load of those that follow each other; of codes, which do no harm, all."""
    return None if isinstance(store, Codes) else alive


def store_split(state: tuple, batch: jax.Array, item: jax.Array, refs: tuple) -> None:
    """Stores the state of one split in the refs of `part_shapes`."""
    out_ref, *rest = refs
    group, width = out_ref.shape[2:4]
    top, total, out = state
    if len(rest) == 1:
        out = [part / jnp.where(total > 0, total, 1.0)[None, :] for part in out]
        sums = (_log_sum(top, total),)
    else:
        sums = (top, total)
    g, e = jnp.arange(_columns(group)), jnp.arange(lanes(width))
    for ref, x in zip(rest, sums, strict=True):
        triton.store(ref.at[batch, item, g], x, mask=g < group)
    mask = (e < width)[:, None] & (g < group)[None, :]
    for j, part in enumerate(out):
        x = part.astype(out_ref.dtype)
        triton.store(out_ref.at[batch, item, g[None, :], e[:, None], j], x, mask=mask)


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
    (batch, n_heads, group, size), n_most = q.shape, int(counts.max())
    spans = np.stack([starts(tuple(counts.tolist()))[:-1], counts], axis=1).astype(np.int32)
    columns = 32 if batch * n_heads * group < _FEW else size
    return gpu_call(
        functools.partial(_join, n_most=n_most, columns=columns),
        jnp.asarray(spans), out.reshape(*top.shape, size), top, total,
        grid=(batch, n_heads, group * pl.cdiv(size, columns)),
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
    columns: int,
):
    """Joins the splits of some columns of one query head."""
    group, size = out_ref.shape[2:]
    batch, head, g, first_column = program_id(0), program_id(1), program_id(2) % group, program_id(2) // group
    first, n = spans_ref[head, 0], spans_ref[head, 1]
    step_size = min(64 if columns > 32 else 128, lanes(n_most))
    item, d = jnp.arange(lanes(n_most)), first_column * columns + jnp.arange(lanes(columns))
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

    out = jax.lax.fori_loop(0, (n + step_size - 1) // step_size, step, jnp.zeros((d.size,), jnp.float32))
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
    triton.store(out_ref.at[batch, head, g, d], out.astype(out_ref.dtype), mask=d < size)

    @pl.when(first_column == 0)
    def _sum():
        lse_ref[batch, head, g] = _log_sum(most, total)


def _dot(a, b):
    """Returns a·b in float32, of factors of a's type."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b.astype(a.dtype), precision=exact, preferred_element_type=jnp.float32)
