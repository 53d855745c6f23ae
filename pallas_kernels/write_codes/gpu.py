"""New rows of stores of codes in Pallas Triton: a program writes one head's row of one store, in place.

XLA takes some sixteen kernels for keys and values together.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import starts
from pallas_kernels.backend import barrier, gpu_call, pl, program_id, triton
from pallas_kernels.instructions import nearest
from pallas_kernels.rows_gpu import lanes
from pallas_kernels.write_codes import reference

__all__ = ["run"]

_MOST = 2**15  # elements of a tile: what a program holds of a block, by channels or by rows of the ring


def run(stores, rings, rows, idx, mass, *, slots: tuple[int, ...]):
    """Returns what `reference.run` returns; its derivatives are the reference's.

    Raises:
        NotImplementedError: for blocks that are too large for one program.
    """
    for store, ring in zip(stores, rings, strict=True):
        window, size = ring.rows.shape[2:]
        if (store.block or 1) * lanes(max(window, size)) > _MOST:
            raise NotImplementedError(f"a program holds a block, got {store.block=} for {ring.rows.shape=}")
    return _run(stores, rings, rows, idx, mass, slots)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _run(stores, rings, rows, idx, mass, slots: tuple[int, ...]):
    held = [(s.codes, s.scale, s.zero, r.rows, r.slot, r.turn) for s, r in zip(stores, rings, strict=True)]
    heads = [starts(slots)[:-1], slots]  # first packed row, capacity, and of each store the first block
    heads += [starts(tuple(pl.cdiv(n, s.block or 1) for n in slots))[:-1] for s in stores]
    forms = tuple((s.bits, s.block) for s in stores)
    flat, tree = jax.tree.flatten(held)
    out = gpu_call(
        functools.partial(_write, forms=forms),
        held, rows, idx, mass, jnp.asarray(np.stack(heads, axis=1), jnp.int32),
        grid=(*idx.shape, len(stores)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat],
        aliases={i: i for i in range(len(flat))}, name="write_codes",
    )  # fmt: skip
    parts = tree.unflatten(out)
    done = (
        dataclasses.replace(store, codes=codes, scale=scale, zero=zero)
        for store, (codes, scale, zero, *_) in zip(stores, parts, strict=True)
    )
    return tuple(done), tuple(
        dataclasses.replace(ring, rows=x, slot=slot, turn=turn)
        for ring, (*_, x, slot, turn) in zip(rings, parts, strict=True)
    )


@_run.defjvp
def _derivative(slots: tuple[int, ...], values, changes):
    """A kernel that writes in place has no derivative."""
    return jax.jvp(functools.partial(reference.run, slots=slots), values, changes)


def _write(
    held_refs,  # of each store codes, scale, zero; of its ring rows [B K W D], slot [B K W], turn [B K]
    row_refs,  # [B K D] each
    idx_ref,  # [B K]
    mass_ref,  # [B R]
    heads_ref,  # [K 2+n] first packed row, capacity, and of each of n stores the first block
    *out_refs,  # what is held
    forms: tuple,  # bits and block of each store
):
    """Writes one row of one of the stores. All is loaded before anything is stored."""
    here, store = (program_id(0), program_id(1)), program_id(2)
    for i, (held, row, (bits, block)) in enumerate(zip(held_refs, row_refs, forms, strict=True)):
        out = out_refs[6 * i : 6 * i + 6]

        @pl.when(store == i)
        def _own(i=i, held=held, row=row, out=out, bits=bits, block=block):
            moves, slot = _entered(here, held, row, out, idx_ref)
            if block is None:
                moves += _row(here, row, out, idx_ref, bits)
            else:
                place = (heads_ref, 2 + i, mass_ref, idx_ref, slot)
                moves += _block(here, held, row, out, place, bits, block)
            barrier()
            for where, x, mask in moves:
                triton.store(where, x, mask=mask)


def _entered(here, held, row_ref, out, idx_ref) -> tuple[list[tuple], jax.Array]:
    """Returns what is to be stored of the ring; and the packed rows in it then."""
    batch, head = here
    rows_ref, slot_ref, turn_ref = held[3:]
    (_, n_heads, window, size), n_rows = rows_ref.shape, out[0].shape[1]
    idx, turn = idx_ref[batch, head], turn_ref[batch, head]
    written = idx < n_rows
    w, d = jnp.arange(lanes(window)), jnp.arange(lanes(size))
    slot = triton.load(slot_ref.at[batch, head, w], mask=w < window, other=n_rows)
    slot = jnp.where((w == turn) & written, idx, jnp.where(slot == idx, n_rows, slot))
    x = triton.load(row_ref.at[batch, head, d], mask=d < size, other=0)
    # Interpreted, what is masked is written back as it was, over what was written: not inside, then.
    to, one = jnp.where(written, turn, window), jnp.arange(1)
    own = jnp.where(written, head, n_heads) + one
    return [
        (out[3].at[batch, head, to, d], x, (d < size) & written),
        (out[4].at[batch, head, w], slot, w < window),
        (out[5].at[batch, own], (turn + 1) % window + 0 * own, own < n_heads),
    ], slot


def _row(here, row_ref, out, idx_ref, bits: int) -> list[tuple]:
    """Returns what is to be stored of one row's codes."""
    batch, head = here
    codes_ref, scale_ref, zero_ref = out[:3]
    (_, n_rows, width), parts = codes_ref.shape, 8 // bits
    idx, e = idx_ref[batch, head], jnp.arange(lanes(width))
    written, real, one = idx < n_rows, e < width, jnp.arange(1)
    xs = [
        triton.load(row_ref.at[batch, head, e * parts + j], mask=real, other=0).astype(jnp.float32)
        for j in range(parts)
    ]
    low, high = zip(*(_edges(x, real) for x in xs), strict=True)
    both = functools.reduce(jnp.minimum, low), functools.reduce(jnp.maximum, high)
    byte, scale, low = _encoded(xs, [both] * parts, bits, scale_ref.dtype)
    own = (batch, idx + one, 0 * one)
    return [
        (codes_ref.at[batch, idx, e], byte, real & written),
        (scale_ref.at[own], scale[0] + jnp.zeros(1, scale_ref.dtype), written & (one == 0)),
        (zero_ref.at[own], low[0] + jnp.zeros(1, zero_ref.dtype), written & (one == 0)),
    ]


def _block(here, held, row_ref, out, place, bits: int, block: int) -> list[tuple]:
    """Returns what is to be stored of the codes of the block that holds the new row."""
    batch, head = here
    heads_ref, column, mass_ref, idx_ref, slot = place
    codes_ref, scale_ref, zero_ref, rows_ref = held[:4]
    (_, n_rows, width), parts, dtype = codes_ref.shape, 8 // bits, rows_ref.dtype
    idx, first = idx_ref[batch, head], heads_ref[head, 0]
    written = idx < n_rows
    n = (idx - first) // block
    p, e = jnp.arange(lanes(block)), jnp.arange(lanes(width))
    inside = (p < block) & (n * block + p < heads_ref[head, 1]) & written
    row, real = jnp.where(inside, first + n * block + p, n_rows), e < width
    mask = inside[:, None] & real[None, :]
    alive = triton.load(mass_ref.at[batch, row], mask=inside, other=0) > 0
    at, exact = _in_ring(slot, row, inside & (row != idx))
    codes = triton.load(codes_ref.at[batch, row[:, None], e[None, :]], mask=mask, other=0)
    which = jnp.where(written, heads_ref[head, column] + n, scale_ref.shape[1])
    xs, edges = [], []
    for j in range(parts):
        channel = e * parts + j
        scale, zero = (
            triton.load(ref.at[batch, which, channel], mask=real & written, other=0).astype(jnp.float32)
            for ref in (scale_ref, zero_ref)
        )
        code = codes if bits == 8 else codes >> 4 if j else codes & 15
        x = (code.astype(jnp.float32) * scale[None, :] + zero[None, :]).astype(dtype)
        known = triton.load(
            rows_ref.at[batch, head, at[:, None], channel[None, :]],
            mask=exact[:, None] & real[None, :], other=0,
        )  # fmt: skip
        new = triton.load(row_ref.at[batch, head, channel], mask=real, other=0)
        x = jnp.where(exact[:, None], known, jnp.where((row == idx)[:, None], new[None, :], x))
        x = x.astype(jnp.float32)
        xs.append(x)
        edges.append(_edges(x, alive[:, None]))
    byte, scales, lows = _encoded(xs, edges, bits, scale_ref.dtype)
    moves = [(out[0].at[batch, row[:, None], e[None, :]], byte, mask)]
    for ref, each in ((out[1], scales), (out[2], lows)):
        moves += [(ref.at[batch, which, e * parts + j], x, real & written) for j, x in enumerate(each)]
    return moves


def _in_ring(slot, row, asked) -> tuple[jax.Array, jax.Array]:
    """Returns where in a ring the rows of a block are, and which of those asked for are there."""
    found = (slot[None, :] == row[:, None]) & asked[:, None]
    at = jnp.max(jnp.where(found, jnp.arange(slot.size)[None, :], 0), axis=1)
    return at, jnp.max(found.astype(jnp.int32), axis=1) > 0


def _edges(x, counts) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest of the values that count, over the first axis."""
    low, high = (jnp.where(counts, x, edge) for edge in (jnp.inf, -jnp.inf))
    return jnp.min(low, axis=0), jnp.max(high, axis=0)


def _encoded(xs, edges, bits: int, dtype) -> tuple:
    """Returns the bytes of values in parts, and each part's scale and zero, from its least and largest."""
    byte, scales, lows = None, [], []
    for j, (x, pair) in enumerate(zip(xs, edges, strict=True)):
        low, high = (jnp.where(jnp.abs(edge) < jnp.inf, edge, 0.0) for edge in pair)
        scale = (jnp.maximum(high - low, 1e-8) / (2**bits - 1)).astype(dtype)
        low = low.astype(dtype)
        code = nearest((x - low.astype(jnp.float32)) / scale.astype(jnp.float32))
        code = jnp.clip(code, 0, 2**bits - 1).astype(jnp.uint8)
        byte = code if byte is None else byte | (code << (4 * j))
        scales.append(scale)
        lows.append(low)
    return byte, scales, lows
