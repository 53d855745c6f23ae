"""What the attention kernels in Pallas Triton share: queries and online softmax; `splits_gpu` joins.

Logits are in base 2. Of codes they lie slots by queries, [P X], since the matrix units take 16 rows and 8
columns: half of the padding of few queries, of the products and of the registers, which decoding needs. Of
plain rows, where memory binds, queries by slots. Arrays in Triton have sizes of powers of two: X pads G, E2
pads the channels. Queries and sums have the parts of the rows, see `rows_gpu`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import AttentionForm, Codes
from pallas_kernels.backend import pl, triton
from pallas_kernels.instructions import exp2, log2, multiply_add
from pallas_kernels.rows_gpu import bare_rows, decode_rows, gain, has_row_scales, lanes, n_parts
from pallas_kernels.splits_gpu import LOG2E, LOWEST, log_sum

__all__ = [
    "attend",
    "check",
    "load_queries",
    "needed",
    "part_queries",
    "part_shapes",
    "store_split",
]


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


def load_queries(q_ref: Any, batch: jax.Array, head: jax.Array, coded: bool) -> list[jax.Array]:
    """Loads the parts of one head's queries, [X E2], or for codes [E2 X]."""
    group, width, parts = q_ref.shape[2:]
    g, e = jnp.arange(_padded(group, coded)), jnp.arange(lanes(width))
    mask = _across(g < group, coded) & _along(e < width, coded)
    g, e = _across(g, coded), _along(e, coded)
    return [triton.load(q_ref.at[batch, head, g, e, i], mask=mask, other=0) for i in range(parts)]


def _padded(group: int, coded: bool) -> int:
    """Returns what G queries are padded to, X: the matrix units take 16 rows, or 8 columns."""
    return max(8, pl.next_power_of_2(group)) if coded else lanes(group)


def _across(x: jax.Array, coded: bool) -> jax.Array:
    """Returns what is of each query, [X], for all slots or channels."""
    return x[None, :] if coded else x[:, None]


def _along(x: jax.Array, coded: bool) -> jax.Array:
    """Returns what is of each slot [P] or channel [E2] for all queries."""
    return x[:, None] if coded else x[None, :]


def _nothing(out_ref: Any, n_slots: int, coded: bool) -> tuple:
    """Returns the state of softmax before the first tile of P slots.

    These are the largest logit [X], the sum of weights [X], that of weights times zeros of codes, and the
    parts of the sum of values [X E2]. Of codes the sums are [P X], over the slots at one place of their
    tiles, since warps meet for a sum over all; and the parts [E2 X].
    """
    group, width, parts = out_ref.shape[2:]
    queries, width = _padded(group, coded), lanes(width)
    shape = (width, queries) if coded else (queries, width)
    none = jnp.zeros((n_slots, queries) if coded else (queries,), jnp.float32)
    out = tuple(jnp.zeros(shape, jnp.float32) for _ in range(parts))
    return jnp.full((queries,), LOWEST, jnp.float32), none, none, out


def _logits(
    q: list[jax.Array],
    keys: list[jax.Array],
    mass: jax.Array,
    form: AttentionForm,
    factor: float,
    coded: bool,
) -> jax.Array:
    """Returns the logits of one tile, [X P], or of codes [P X], from the parts of the keys [P E2]."""
    logit = sum(_dot(key, part) if coded else _dot(part, key.T) for part, key in zip(q, keys, strict=True))
    scale = factor * LOG2E
    if form.softcap is not None:  # tanh(x) = 1 - 2/(1 + exp 2x)
        logit = 1 - 2 / (1 + exp2(logit * (2 * scale / form.softcap)))
        scale = form.softcap * LOG2E
    logit = multiply_add(logit, jnp.float32(scale), _along(log2(jnp.maximum(mass, 1e-30)), coded))
    return jnp.where(_along(mass > 0, coded), logit, 2 * LOWEST)


def _fold(state: tuple, logit: jax.Array, values: list[jax.Array], pair: tuple | None, coded: bool) -> tuple:
    """Takes one tile of P slots into the state of softmax.

    logit: as of `_logits`. values, pair: as of `bare_rows`; those of slots without mass are finite.
    """
    top, total, shift, out = state
    new = jnp.maximum(top, jnp.max(logit, axis=0 if coded else 1))
    p, old = exp2(logit - _across(new, coded)), exp2(top - new)
    total = multiply_add(total, old[None, :], p) if coded else total * old + jnp.sum(p, axis=1)
    if pair is not None:
        scale, zero = (_along(x, coded) for x in pair)
        shift = multiply_add(shift, old[None, :], p * zero)
        p = p * scale
    products = (_dot(value.T, p) if coded else _dot(p, value) for value in values)
    out = tuple(part * _across(old, coded) + x for part, x in zip(out, products, strict=True))
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
    """Returns the largest logits, the sums of weights and those of values over the tiles of all steps.

    n_slots: of a step, P. load: gives the keys of a step and their masses [P]; and its values, given the
    masses. Rows are as of `load_rows`.
    """
    (load_keys, load_values), coded = load, has_codes(*stores)

    def weigh(keys, mass):
        return _logits(q, decode_rows(stores[0], keys, None, q[0].dtype), mass, form, factor, coded)

    def add(state, logit, values, mass):
        return _fold(state, logit, *bare_rows(stores[1], values, mass > 0, q[0].dtype), coded)

    def step(i, state):
        keys, mass = load_keys(i)
        values = load_values(i, mass)
        return add(state, weigh(keys, mass), values, mass)

    start = _nothing(out_ref, n_slots, coded)
    if not coded:
        top, total, _, out = jax.lax.fori_loop(0, n_steps, step, start)
        return top, total, out
    top, total, shift, out = _run_ahead(n_steps, load, weigh, add, start)
    if has_row_scales(stores[1]):
        shift = jnp.sum(shift, axis=0)[None, :]
        out = tuple(part / gain(stores[1]) + shift for part in out)
    return top, jnp.sum(total, axis=0), out


def _run_ahead(n_steps: jax.Array, load: tuple, weigh: Callable, add: Callable, start: tuple) -> tuple:
    """Takes all steps, each of which loads for the next one in the place of what it has used.

    The compiler itself loads rows ahead, but in the order of the matrix units, which for codes is byte by
    byte; what a loop carries it moves whole.
    """
    load_keys, load_values = load

    def step(i, carry):
        state, keys, values, mass = carry
        logit = weigh(keys, mass)
        keys, after = load_keys(i + 1)
        state = add(state, logit, values, mass)
        return state, keys, load_values(i + 1, after), after

    keys, mass = load_keys(0)
    return jax.lax.fori_loop(0, n_steps, step, (start, keys, load_values(0, mass), mass))[0]


def has_codes(*stores: Any) -> bool:
    """Returns whether any rows are codes: logits lie slots by queries then, see above."""
    return any(isinstance(store, Codes) for store in stores)


def needed(store: Any, alive: jax.Array) -> jax.Array | None:
    """Returns which rows to load of those that follow each other; of codes, which do no harm, all."""
    return None if isinstance(store, Codes) else alive


def store_split(state: tuple, batch: jax.Array, item: jax.Array, refs: tuple, coded: bool) -> None:
    """Stores the state of one split in the refs of `part_shapes`."""
    out_ref, *rest = refs
    group, width = out_ref.shape[2:4]
    top, total, out = state
    if len(rest) == 1:
        out = [part / _across(jnp.where(total > 0, total, 1.0), coded) for part in out]
        sums = (log_sum(top, total),)
    else:
        sums = (top, total)
    g, e = jnp.arange(top.size), jnp.arange(lanes(width))
    for ref, x in zip(rest, sums, strict=True):
        triton.store(ref.at[batch, item, g], x, mask=g < group)
    mask = _across(g < group, coded) & _along(e < width, coded)
    g, e = _across(g, coded), _along(e, coded)
    for j, part in enumerate(out):
        triton.store(out_ref.at[batch, item, g, e, j], part.astype(out_ref.dtype), mask=mask)


def _dot(a, b):
    """Returns a·b in float32, of factors of the narrower type, or of a's."""
    dtype = min(a.dtype, b.dtype, key=lambda x: jnp.finfo(x).bits)
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.dot(a.astype(dtype), b.astype(dtype), precision=exact, preferred_element_type=jnp.float32)
