"""Row copies in Pallas Triton: a program walks through lists, tile by tile, by pointers.

Loads from pinned host memory cross the bus, all of a tile's at once. What a place far from others takes is
the translation of its address, however many bytes it has: the GPU remembers few of them, beside the rows of
a layer. So programs are as few as keep the bus busy, and each goes through one head's rows after the
other's, in their order; where heads are few, several programs take turns at a head's tiles. A list is mostly
far shorter than its room, and ends a walk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Codes, starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.host import Blocks, Pages
from pallas_kernels.rows_gpu import decode_rows, lanes, load_rows

__all__ = ["run"]

_TILE = 64
_PROGRAMS = 64
_WARPS = 8


def run(near, far, staged, idx, line, first, *, blocks: Blocks):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take.
    """
    if near[0].dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {near[0].dtype}")
    if isinstance(far, Pages):
        raise NotImplementedError("pages are a TPU's, whose kernel copies no rows: give rows or codes")
    (batch, n_heads, n), slots = idx.shape, blocks.slots
    heads = jnp.asarray(np.stack([starts(slots)[:-1], slots], axis=1), jnp.int32)
    tiles = pl.cdiv(n * blocks.size, _TILE)
    turns = min(tiles, pl.cdiv(_PROGRAMS, batch * n_heads))
    lines = jax.ShapeDtypeStruct(near[0].shape, near[0].dtype)
    return gpu_call(
        functools.partial(_copy, block=blocks.size, turns=turns),
        *near, far, *staged, idx, line, first, heads,
        grid=(min(_PROGRAMS, batch * n_heads * turns),), out_shape=(lines, lines), aliases={0: 0, 1: 1},
        warps=_WARPS, name="fetch_rows",
    )  # fmt: skip


def _copy(
    _near_k,  # [B Q D] near, which are the outputs
    _near_v,
    far_ref,  # [B 2R D], or pairs of codes; in device or pinned host memory
    staged_k_ref,  # [B K W D]
    staged_v_ref,  # [B K W D]
    idx_ref,  # [B K N]
    line_ref,  # [B K N]
    first_ref,  # [B K]
    heads_ref,  # [K 2] first packed row and capacity
    k_ref,  # [B Q D] out
    v_ref,  # [B Q D] out
    *,
    block: int,  # P
    turns: int,
):
    """Walks through lists, of each of which it takes every `turns`-th tile."""
    start = program_id(0)
    refs = far_ref, (staged_k_ref, staged_v_ref), (idx_ref, line_ref), first_ref, heads_ref, (k_ref, v_ref)
    n_batch, n_heads, n_listed = idx_ref.shape
    walks = n_batch * n_heads * turns
    n_programs = min(_PROGRAMS, walks)

    def begun(batch, head, tile):
        """Says whether a tile begins before the list's end."""
        n = jax.lax.div(tile * _TILE, block)
        return triton.load(idx_ref.at[batch, head, n], mask=n < n_listed, other=-1) >= 0

    def step(carry):
        batch, head, tile, _ = carry
        _copy_tile(refs, batch, head, tile, block)
        return batch, head, tile + turns, begun(batch, head, tile + turns)

    def walk(i, _):
        at = start + i * n_programs
        list_at, tile = jax.lax.div(at, turns), jax.lax.rem(at, turns)
        there = at < walks
        batch, head = jnp.where(there, jax.lax.div(list_at, n_heads), 0), jax.lax.rem(list_at, n_heads)
        first = (batch, head, tile, there & begun(batch, head, tile))
        jax.lax.while_loop(lambda carry: carry[3], step, first)
        return _

    jax.lax.fori_loop(0, pl.cdiv(walks, n_programs), walk, 0)


def _copy_tile(refs: tuple, batch, head, tile, block: int):
    """Copies one tile of one head's list: keys and values from where they lie."""
    far_ref, staged_refs, lists, first_ref, heads_ref, out_refs = refs
    _, n_rows, size = out_refs[0].shape
    channel = jnp.arange(lanes(size))
    fits = (channel < size)[None, :]
    n_heads, n_listed = lists[0].shape[1:]
    at = tile * _TILE + jnp.arange(_TILE)
    n, inside = jax.lax.div(at, block), jax.lax.rem(at, block)
    chosen, line = (triton.load(x.at[batch, head, n], mask=n < n_listed, other=-1) for x in lists)
    slot = chosen * block + inside
    late = slot - first_ref[batch, head]
    alive = (chosen >= 0) & (line >= 0) & (slot < heads_ref[head, 1]) & (late < staged_refs[0].shape[2])
    old, new = alive & (late < 0), alive & (late >= 0)
    loaded = _load_both(far_ref, batch, jnp.where(old, heads_ref[head, 0] + slot, 0), old)
    # Interpreted, what is masked is written back as it was, over what others wrote: not inside, then.
    to = jnp.where(alive, head * (n_rows // n_heads) + line * block + inside, n_rows)
    for one, staged_ref, out_ref in zip(loaded, staged_refs, out_refs, strict=True):
        (rows,) = decode_rows(far_ref, one, None, out_ref.dtype)
        place = staged_ref.at[batch, head, jnp.where(new, late, 0)[:, None], channel[None, :]]
        staged = triton.load(place, mask=new[:, None] & fits, other=0)
        rows = jnp.where(new[:, None], staged, rows.astype(out_ref.dtype))
        triton.store(out_ref.at[batch, to[:, None], channel[None, :]], rows, mask=alive[:, None] & fits)


def _load_both(far_ref, batch, row, alive):
    """Loads keys and values of packed rows, for `decode_rows`."""
    if not isinstance(far_ref, Codes):
        return [load_rows(far_ref, (batch, 2 * row + i, 0), alive) for i in range(2)]
    size = far_ref.codes.shape[2]
    channel = jnp.arange(lanes(size))
    mask = alive[:, None] & (channel < size)[None, :]
    words = triton.load(far_ref.codes.at[batch, row[:, None], channel[None, :]], mask=mask, other=0)
    both = []
    for i in range(2):
        parts = (triton.load(x.at[batch, row, i], mask=alive, other=0) for x in (far_ref.scale, far_ref.zero))
        codes = ((words >> (8 * i)) & 255).astype(jnp.uint8)
        both.append((codes[:, None], *(x[:, None] for x in parts)))
    return both
