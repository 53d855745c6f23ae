"""Merges in Pallas Triton: XLA packs what is left, then a program writes the means of a tile of new rows.

Rows that go into the same are linked first: a kernel finds the next one of each among those that
follow, or XLA sorts them. Means are added up in one walk along the links. Channels are read in halves,
which is how a rotation pairs them; E pads them to a power of 2.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.rows_gpu import lanes, load_halves, store_halves, turn

__all__ = ["Settings", "run"]


_LINKED, _AHEAD = 32, 256  # rows of a program that links, and how many it compares them with at a time
_NEAR = 2048  # rows of a reach up to which that takes less than sorting
_FEW = 4  # times as many new rows as merges from which on those that are means are listed


@dataclass(frozen=True)
class Settings:
    """tile: rows of a program."""

    tile: int = 8
    warps: int = 2


def run(rows, n, old, into, pos, frequencies, *, form):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or head sizes that the kernel does not take.
    """
    for x in rows:
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or x.shape[2] % 2 or x.shape[2] > 512:
            raise NotImplementedError(
                f"the kernel takes float32, bfloat16 and float16, and even head sizes up to 512, got "
                f"{x.shape} {x.dtype}: use the reference"
            )
    reach = max(form.slots) if form.reach is None else form.reach
    first, follows = _linked(into, reach) if reach <= _NEAR else _sorted(into, form.slots)
    given = (*rows, n) if pos is None else (*rows, n, pos)
    kept = [_taken(x, old) for x in given]
    width = sum(x.shape[2] * x.dtype.itemsize for x in rows)
    turned = "no" if frequencies is None else "yes"
    chosen = tuning.settings("merge_rows", Settings(), bytes=width, turned=turned)
    # Where few new rows are means, these are listed; else programs go through all of them.
    few = (
        _where(_taken(first, old, n.shape[1]) < n.shape[1], form.most)
        if _FEW * form.most < old.shape[1]
        else None
    )
    n_tiles = pl.cdiv(old.shape[1] if few is None else few.shape[1], chosen.tile)
    found = gpu_call(
        functools.partial(_merge, tile=chosen.tile, factor=form.factor),
        kept, rows, n, old, few, first, follows, pos, frequencies,
        grid=(n_tiles, len(n)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept],
        aliases={i: i for i in range(len(kept))}, warps=chosen.warps, name="merge_rows",
    )  # fmt: skip
    k = len(rows)
    return tuple(found[:k]), found[k], None if pos is None else found[k + 1]


def _linked(into, reach: int):
    """Returns the first row that goes into each, and the next one after each; R = none."""
    batch, n_rows = into.shape
    first, row = jnp.full(into.shape, n_rows, jnp.int32), jnp.arange(n_rows, dtype=jnp.int32)
    follows = gpu_call(
        functools.partial(_link, steps=pl.cdiv(reach + _LINKED, _AHEAD)),
        into,
        grid=(pl.cdiv(n_rows, _LINKED), batch), out_shape=jax.ShapeDtypeStruct(into.shape, jnp.int32),
        warps=2, name="merge_rows_link",
    )  # fmt: skip
    return first.at[jnp.arange(batch)[:, None], into].min(row, mode="drop"), follows


def _sorted(into, slots):
    """Returns what `_linked` does, by sorting: head by head, where heads are as large."""
    batch, n_rows = into.shape
    row = jnp.broadcast_to(jnp.arange(n_rows, dtype=jnp.int32), into.shape)
    size = slots[0] if len(set(slots)) == 1 else n_rows
    keys = (x.reshape(-1, size) for x in (jnp.minimum(into, n_rows), row))
    into, row = (x.reshape(batch, n_rows) for x in jax.lax.sort(tuple(keys), num_keys=1))
    alike = jnp.pad(
        (into[:, 1:] == into[:, :-1]) & (into[:, 1:] < n_rows), ((0, 0), (1, 0))
    )  # as the one before
    b, none = jnp.arange(batch)[:, None], jnp.full((batch, n_rows), n_rows, jnp.int32)
    first = none.at[b, jnp.where(alike, n_rows, into)].set(row, mode="drop")
    before = jnp.pad(row[:, :-1], ((0, 0), (1, 0)))
    return first, none.at[b, jnp.where(alike, before, n_rows)].set(row, mode="drop")


def _taken(x, old, empty=0):
    """Returns the rows that new ones continue, `empty` for empty ones."""
    at = old.reshape(old.shape + (1,) * (x.ndim - 2))
    rows = jnp.take_along_axis(x, jnp.maximum(at, 0), axis=1)
    return jnp.where(at >= 0, rows, jnp.asarray(empty, x.dtype))


def _where(flags, most: int):
    """Returns the places [B most] of at most so many flags of each row, as many as there are for none."""
    size, most = flags.shape[1], max(most, 1)
    nth = jnp.where(flags, jnp.cumsum(flags, axis=1) - 1, most)
    at = jnp.full((len(flags), most), size, jnp.int32)
    return at.at[jnp.arange(len(flags))[:, None], nth].set(jnp.arange(size, dtype=jnp.int32), mode="drop")


def _link(
    into_ref,  # [B R]
    follows_ref,  # [B R] the next row that goes into the same, R = none
    *,
    steps: int,
):
    """Links one tile of rows."""
    batch, n_rows = program_id(1), into_ref.shape[1]
    first = program_id(0) * _LINKED
    row = first + jnp.arange(_LINKED)
    here = triton.load(into_ref.at[batch, row], mask=row < n_rows, other=n_rows)

    def step(i, found):
        at = first + i * _AHEAD + jnp.arange(_AHEAD)
        there = triton.load(into_ref.at[batch, at], mask=at < n_rows, other=n_rows)
        hit = (here[:, None] == there[None, :]) & (at[None, :] > row[:, None])
        return jnp.minimum(found, jnp.min(jnp.where(hit, at[None, :], n_rows), axis=1))

    linked = jnp.max((here < n_rows).astype(jnp.int32))  # else no row of this tile goes anywhere
    found = jax.lax.fori_loop(0, steps * linked, step, jnp.full((_LINKED,), n_rows))
    triton.store(follows_ref.at[batch, row], jnp.where(here < n_rows, found, n_rows), mask=row < n_rows)


def _merge(
    _,  # what becomes the outputs
    row_refs,  # of each array [B R D]
    n_ref,  # [B R]
    old_ref,  # [B Q]
    few_ref,  # [B N] the new rows that are means, Q = none; or None
    first_ref,  # [B R] the first row that goes into each, R = none
    follows_ref,  # [B R]
    pos_ref,  # [B R], or None
    frequency_ref,  # [D/2], or None
    *out_refs,  # [B Q D] of each array, n [B Q], positions [B Q]
    tile: int,  # X
    factor: float,
):
    """Writes the means of one tile of new rows of one batch row."""
    batch, n_rows = program_id(1), n_ref.shape[1]
    new = program_id(0) * tile + jnp.arange(tile)
    if few_ref is not None:
        new = triton.load(few_ref.at[batch, new], mask=new < few_ref.shape[1], other=old_ref.shape[1])
    row = triton.load(old_ref.at[batch, new], mask=new < old_ref.shape[1], other=-1)
    then = triton.load(first_ref.at[batch, row], mask=row >= 0, other=n_rows)
    merged = then < n_rows
    refs = (row_refs, n_ref, follows_ref, pos_ref, frequency_ref)
    total, moment, sums = _sums(refs, batch, row, then, factor)

    @pl.when(jnp.max(merged.astype(jnp.int32)) > 0)
    def _():
        n = jnp.maximum(total, 1.0)
        pos = _round(moment / n)
        for i, (out, pair) in enumerate(zip(out_refs, sums, strict=False)):
            mean = [x / n[:, None] for x in pair]
            if i == 0 and frequency_ref is not None:
                mean = [x * factor for x in turn(mean, pos, frequency_ref, False)]
            store_halves(out, batch, new, mean, merged)
        to = jnp.where(merged, new, old_ref.shape[1])
        triton.store(out_refs[len(row_refs)].at[batch, to], total, mask=merged)
        if pos_ref is not None:
            triton.store(out_refs[-1].at[batch, to], pos.astype(jnp.int32), mask=merged)


def _sums(refs, batch, row, then, factor: float):
    """Adds up n, n times the position, and n times each array, of rows [X] and of what goes into them.

    then: the first that goes into each. Where that is none, sums are left at 0.
    """
    row_refs, n_ref, follows_ref, pos_ref, frequency_ref = refs
    n_rows, tile = n_ref.shape[1], len(row)

    def add(carry):
        row, then, go, total, moment, sums = carry
        n, pos = triton.load(n_ref.at[batch, row], mask=go, other=0), jnp.zeros((tile,), jnp.float32)
        if pos_ref is not None:
            pos = triton.load(pos_ref.at[batch, row], mask=go, other=0).astype(jnp.float32)
        after = []
        for i, (ref, both) in enumerate(zip(row_refs, sums, strict=True)):
            pair = [x.astype(jnp.float32) for x in load_halves(ref, batch, row, go)]
            if i == 0 and frequency_ref is not None:
                pair = [x / factor for x in turn(pair, pos, frequency_ref, True)]
            after.append([y + n[:, None] * x for x, y in zip(pair, both, strict=True)])
        go = go & (then < n_rows)
        following = triton.load(follows_ref.at[batch, then], mask=go, other=n_rows)
        return then, following, go, total + n, moment + n * pos, after

    zero = jnp.zeros((tile,), jnp.float32)
    sums = [[jnp.zeros((tile, lanes(ref.shape[2] // 2)), jnp.float32)] * 2 for ref in row_refs]
    start = (row, then, then < n_rows, zero, zero, sums)
    return jax.lax.while_loop(lambda carry: jnp.max(carry[2].astype(jnp.int32)) > 0, add, start)[3:]


def _round(x):
    """Rounds numbers of at least 0 to the nearest, halves to even."""
    low = jnp.floor(x)
    rest, odd = x - low, low - 2 * jnp.floor(low / 2)
    return jnp.where((rest > 0.5) | ((rest == 0.5) & (odd > 0)), low + 1, low)
