"""Lines in Pallas Triton: a kernel looks blocks up, another finds the lines to go, a third assigns them.

The first and the last have a program for each tile of one head's list; the last begins where the new blocks
of the tiles before end, which the first has counted. Between them one program per head bisects the time
before which as many lines were read last as there are new blocks: times are few, beside floats.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.assign_lines import reference
from pallas_kernels.attention import starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.host import Blocks

__all__ = ["run"]

_TILE = 256
_BLOCK = 2**14  # lines that are looked at together, at most; fewer than 2^15


def run(line, held, used, idx, now, *, blocks: Blocks):
    """Returns what `reference.run` returns."""
    batch, n_heads, n = idx.shape
    n_tiles = pl.cdiv(n, _TILE)
    row = jnp.asarray(starts(blocks.counts)[:-1])
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    grid = (batch, n_heads, n_tiles)
    count = jax.ShapeDtypeStruct(grid, jnp.int32)
    used, known, counts = gpu_call(
        _look_up, used, line, idx, now, row,
        grid=grid, out_shape=(shape(used), shape(idx), count), aliases={0: 0}, name="assign_lines_look_up",
    )  # fmt: skip
    block = min(_BLOCK, pl.next_power_of_2(used.shape[2]))
    oldest = gpu_call(
        functools.partial(_oldest, block=block), used, now, counts,
        grid=grid[:2], out_shape=shape(idx), warps=max(1, min(16, block // 256)), stages=1,
        name="assign_lines_oldest",
    )  # fmt: skip
    line, held, used, place, new, into = gpu_call(
        functools.partial(_assign, n_tiles=n_tiles),
        line, held, used, idx, now, row, known, counts, oldest,
        grid=grid, out_shape=(shape(line), shape(held), shape(used), *(shape(idx),) * 3),
        aliases={0: 0, 1: 1, 2: 2}, name="assign_lines",
    )  # fmt: skip
    if blocks.size > 1:  # blocks that are listed again
        place = reference.look_up(line, idx, blocks)
    return line, held, used, place, new, into


def _listed(idx_ref, batch, head) -> tuple:
    """Returns a tile of a head's list: places, which exist, blocks, and which are named first."""
    at = program_id(2) * _TILE + jnp.arange(_TILE)
    inside = at < idx_ref.shape[2]
    idx = triton.load(idx_ref.at[batch, head, at], mask=inside, other=-1)
    before = triton.load(idx_ref.at[batch, head, at - 1], mask=inside & (at > 0), other=-1)
    return at, inside, idx, (idx >= 0) & (idx != before)


def _look_up(
    _,  # [B K C] used, which is the first output
    line_ref,  # [B M]
    idx_ref,  # [B K N]
    now_ref,  # [B]
    row_ref,  # [K] first block of each head
    used_ref,  # [B K C] out
    known_ref,  # [B K N] out
    count_ref,  # [B K tiles] out
):
    """Finds the lines that hold blocks already, says that they are read, and counts the other blocks."""
    batch, head = program_id(0), program_id(1)
    at, inside, idx, first = _listed(idx_ref, batch, head)
    known = triton.load(line_ref.at[batch, row_ref[head] + jnp.maximum(idx, 0)], mask=idx >= 0, other=-1)
    triton.store(known_ref.at[batch, head, at], known, mask=inside)
    # Interpreted, what is masked is written back as it was, over what others wrote: not inside, then.
    to = jnp.where(known >= 0, known, used_ref.shape[2])
    triton.store(used_ref.at[batch, head, to], jnp.full((_TILE,), now_ref[batch]), mask=known >= 0)
    count_ref[batch, head, program_id(2)] = jnp.sum((first & (known < 0)).astype(jnp.int32))


def _oldest(
    used_ref,  # [B K C]
    now_ref,  # [B]
    count_ref,  # [B K tiles]
    oldest_ref,  # [B K N] out, as many as there are new blocks
    *,
    block: int,
):
    """Lists one head's lines that were read longest ago, in the order of their numbers."""
    batch, head = program_id(0), program_id(1)
    n_lines, n_tiles, now = used_ref.shape[2], count_ref.shape[2], now_ref[batch]
    tiles = jnp.arange(pl.next_power_of_2(n_tiles))
    counts = triton.load(count_ref.at[batch, head, tiles], mask=tiles < n_tiles, other=0)
    wanted, steps = jnp.sum(counts, axis=0), pl.cdiv(n_lines, block)

    def load(i):
        at = i * block + jnp.arange(block)
        return at, triton.load(used_ref.at[batch, head, at], mask=at < n_lines, other=now)

    held = load(0) if steps == 1 else None
    read = lambda i: load(i) if held is None else held  # noqa: E731

    def total(time):
        """Counts the lines that were read last at a time or before."""
        body = lambda i, n: n + jnp.sum((read(i)[1] <= time).astype(jnp.int32), axis=0)  # noqa: E731
        return jax.lax.fori_loop(0, steps, body, jnp.int32(0))

    def halve(carry):
        low, high = carry
        middle = (low + high) >> 1
        enough = total(middle) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    def older(i, least):
        return jnp.minimum(least, jnp.min(read(i)[1], axis=0))

    never = jax.lax.fori_loop(0, steps, older, now) - 1
    _, last = jax.lax.while_loop(lambda x: x[1] > x[0] + 1, halve, (never, now - 1))
    left = wanted - total(last - 1)  # of those read at `last`

    def write(i, carry):
        before, seen = carry  # lines read before `last`, and at it
        at, used = read(i)
        tie, older = used == last, used < last
        both = older.astype(jnp.int32) + (tie.astype(jnp.int32) << 16)  # a block has fewer than 2^15
        upto = jnp.cumsum(both, axis=0)
        n_older, n_tie = before + (upto & 0xFFFF), seen + (upto >> 16)
        inside = older | (tie & (n_tie <= left))
        # Interpreted, what is masked is written back as it was, over what others wrote: not inside, then.
        place = jnp.where(inside, n_older + jnp.minimum(n_tie, left) - 1, oldest_ref.shape[2])
        triton.store(oldest_ref.at[batch, head, place], at, mask=inside)
        total = jnp.sum(both, axis=0)
        return before + (total & 0xFFFF), seen + (total >> 16)

    jax.lax.fori_loop(0, steps, write, (jnp.int32(0), jnp.int32(0)))


def _assign(
    _line,  # [B M], [B K C] and [B K C]: line, held and used, which are the first outputs
    _held,
    _used,
    idx_ref,  # [B K N]
    now_ref,  # [B]
    row_ref,  # [K] first block of each head
    known_ref,  # [B K N]
    count_ref,  # [B K tiles]
    oldest_ref,  # [B K N]
    line_ref,  # [B M] out
    held_ref,  # [B K C] out
    used_ref,  # [B K C] out
    place_ref,  # [B K N] out
    new_ref,  # [B K N] out
    into_ref,  # [B K N] out
    *,
    n_tiles: int,
):
    """Gives the new blocks of a tile their lines."""
    batch, head, tile = program_id(0), program_id(1), program_id(2)
    at, inside, idx, first = _listed(idx_ref, batch, head)
    known = triton.load(known_ref.at[batch, head, at], mask=inside, other=-1)
    new = first & (known < 0)
    tiles = jnp.arange(pl.next_power_of_2(n_tiles))
    counts = triton.load(count_ref.at[batch, head, tiles], mask=tiles < n_tiles, other=0)
    before = jnp.sum(jnp.where(tiles < tile, counts, 0))
    rank = before + jnp.cumsum(new.astype(jnp.int32), axis=0) - 1
    taken = triton.load(oldest_ref.at[batch, head, jnp.maximum(rank, 0)], mask=new, other=0)
    lost = triton.load(held_ref.at[batch, head, taken], mask=new, other=-1)
    triton.store(place_ref.at[batch, head, at], jnp.where(new, taken, known), mask=inside)
    # Interpreted, what is masked is written back as it was, over what others wrote: not inside, then.
    nowhere, row, n = line_ref.shape[1], row_ref[head], idx_ref.shape[2]
    for ref, values in ((new_ref, idx), (into_ref, taken)):
        rest = inside & (at >= jnp.sum(counts))
        triton.store(ref.at[batch, head, jnp.where(rest, at, n)], jnp.full((_TILE,), -1), mask=rest)
        triton.store(ref.at[batch, head, jnp.where(new, rank, n)], values, mask=new)
    gone = new & (lost >= 0)
    triton.store(line_ref.at[batch, jnp.where(gone, row + lost, nowhere)], jnp.full((_TILE,), -1), mask=gone)
    triton.store(line_ref.at[batch, jnp.where(new, row + idx, nowhere)], taken, mask=new)
    to = jnp.where(new, taken, held_ref.shape[2])
    triton.store(held_ref.at[batch, head, to], idx, mask=new)
    triton.store(used_ref.at[batch, head, to], jnp.full((_TILE,), now_ref[batch]), mask=new)
