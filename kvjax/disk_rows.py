"""Brings the rows of a layer from a disk to the device, within a program, some of them at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import disk

__all__ = ["every", "into_lines"]

_AT_ONCE = (2**22, 2**25)  # bytes that a program asks a disk for at once: of blocks, and of a whole layer


def into_lines(tier: Any, idx: Int[Array, "B K N"], line: Int[Array, "B K N"]) -> tuple[Array, Array]:
    """Returns a tier's lines [B Q D] with blocks idx, from a disk and from what is staged."""
    n_heads, size = idx.shape[1], tier.block
    n_lines = tier.k.shape[1] // (n_heads * size)

    def put(lines: tuple[Array, ...], at: tuple[Array, ...], rows: Array, entry: Array) -> tuple[Array, ...]:
        b, h, block = at
        slot, first = block[:, None] * size + jnp.arange(size), tier.first[b, h][:, None]
        row = jnp.clip(slot - first, 0, tier.new_k.shape[2] - 1)
        to = jnp.where(entry >= 0, line.reshape(-1)[entry], n_lines)
        out = []
        for x, new, i in zip(lines, (tier.new_k, tier.new_v), range(2), strict=True):
            rows_i = jnp.where((slot < first)[..., None], rows[:, :, i], new[b[:, None], h[:, None], row])
            x_lines = x.reshape(*idx.shape[:2], n_lines, size, -1)
            out.append(x_lines.at[b, h, to].set(rows_i, mode="drop").reshape(x.shape))
        return tuple(out)

    return _asked(tier, idx, size, (tier.k, tier.v), put)


def _asked(
    tier: Any,
    idx: Int[Array, "B K N"],
    size: int,
    state: Any,
    put: Callable[..., Any],
    *,
    whole: bool = False,
) -> Any:
    """Asks a disk for blocks of `size` slots, some of them at a time, and returns what `put` makes of them.

    put: takes what it returned before, the row, the head and the number of each block, its rows [M P 2 D],
        and its place in idx, -1 for none.
    """
    n_heads, n = idx.shape[1:]
    block_bytes = 2 * size * tier.k.shape[2] * tier.k.dtype.itemsize
    at = min(max(1, _AT_ONCE[whole] // block_bytes), idx.size)
    rank = jnp.where(idx >= 0, jnp.cumsum((idx >= 0).reshape(-1)).reshape(idx.shape) - 1, idx.size)
    entries = jnp.full(-(-idx.size // at) * at, -1, jnp.int32)
    entries = entries.at[rank.reshape(-1)].set(jnp.arange(idx.size, dtype=jnp.int32), mode="drop")
    like = jax.ShapeDtypeStruct((size, 2, tier.k.shape[2]), tier.k.dtype)

    def step(carry: tuple) -> tuple:
        i, state = carry
        entry = jax.lax.dynamic_slice(entries, (i * at,), (at,))
        b, h = jnp.maximum(entry, 0) // (n_heads * n), jnp.maximum(entry, 0) // n % n_heads
        block = jnp.where(entry >= 0, idx.reshape(-1)[entry], -1)
        there = jnp.where(block * size < tier.first[b, h], block, -1)
        rows = disk.fetch(tier.far, jnp.stack([b, h, there]), like, whole=whole)
        return i + 1, put(state, (b, h, block), rows, entry)

    return jax.lax.while_loop(lambda c: c[0] * at < (idx >= 0).sum(), step, (jnp.int32(0), state))[1]


def every(tier: Any, slots: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns all rows [B R D] that lie on a disk."""
    size, (batch, n_heads, _, head_dim) = tier.far.chunk, tier.new_k.shape
    n_chunks = -(-max(slots) // size)
    # After this layer's rows are known, and not for all layers when the program begins.
    first, _ = jax.lax.optimization_barrier((tier.first, tier.new_k))
    chunk = jnp.arange(n_chunks, dtype=jnp.int32)
    chunk = jnp.where(chunk * size < first[..., None], chunk, -1)

    def put(rows: tuple[Array, ...], at: tuple[Array, ...], new: Array, entry: Array) -> tuple[Array, ...]:
        b, h, c = at
        c = jnp.where(entry >= 0, c, n_chunks)
        return tuple(x.at[b, h, c].set(new[:, :, i], mode="drop") for i, x in enumerate(rows))

    empty = jnp.zeros((batch, n_heads, n_chunks, size, head_dim), tier.new_k.dtype)
    rows = _asked(tier, chunk, size, (empty, empty), put, whole=True)
    return tuple(
        x.reshape(batch, n_heads, -1, head_dim)[:, :, : max(slots)].reshape(batch, -1, head_dim) for x in rows
    )
