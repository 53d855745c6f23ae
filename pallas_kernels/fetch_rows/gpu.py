"""Row copies in Pallas Triton: programs take turns at the tiles of one head's list, by pointers.

Loads from pinned host memory cross the bus: all of a tile's are under way at once, and a program
waits for nothing else, so that many programs keep the bus busy. A list is mostly far shorter than
its room: a program ends at the first tile that begins after it.
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

_TILE = 32
_PROGRAMS = 4096  # wanted in all
_WARPS = 4


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
    programs = min(tiles, pl.cdiv(_PROGRAMS, batch * n_heads))
    lines = jax.ShapeDtypeStruct(near[0].shape, near[0].dtype)
    return gpu_call(
        functools.partial(_copy, block=blocks.size, programs=programs),
        *near, far, *staged, idx, line, first, heads,
        grid=(batch, n_heads, programs), out_shape=(lines, lines), aliases={0: 0, 1: 1}, warps=_WARPS,
        name="fetch_rows",
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
    programs: int,
):
    """Copies every `programs`-th tile of one head's list."""
    batch, head = program_id(0), program_id(1)
    _, n_rows, size = k_ref.shape
    channel = jnp.arange(lanes(size))
    fits = (channel < size)[None, :]
    per_head, n_listed = n_rows // idx_ref.shape[1], idx_ref.shape[2]

    def begun(tile):
        """Says whether a tile begins before the list's end."""
        n = jax.lax.div(tile * _TILE, block)
        return triton.load(idx_ref.at[batch, head, n], mask=n < n_listed, other=-1) >= 0

    def copy(carry):
        tile, _ = carry
        at = tile * _TILE + jnp.arange(_TILE)
        n, inside = jax.lax.div(at, block), jax.lax.rem(at, block)
        listed = lambda ref: triton.load(ref.at[batch, head, n], mask=n < n_listed, other=-1)  # noqa: E731
        chosen, line = listed(idx_ref), listed(line_ref)
        slot = chosen * block + inside
        late = slot - first_ref[batch, head]
        alive = (chosen >= 0) & (line >= 0) & (slot < heads_ref[head, 1]) & (late < staged_k_ref.shape[2])
        old, new = alive & (late < 0), alive & (late >= 0)
        loaded = _load_both(far_ref, batch, jnp.where(old, heads_ref[head, 0] + slot, 0), old)
        # Interpreted, what is masked is written back as it was, over what others wrote: not inside, then.
        to = jnp.where(alive, head * per_head + line * block + inside, n_rows)
        for one, staged_ref, out_ref in zip(
            loaded, (staged_k_ref, staged_v_ref), (k_ref, v_ref), strict=True
        ):
            (rows,) = decode_rows(far_ref, one, None, out_ref.dtype)
            place = staged_ref.at[batch, head, jnp.where(new, late, 0)[:, None], channel[None, :]]
            staged = triton.load(place, mask=new[:, None] & fits, other=0)
            rows = jnp.where(new[:, None], staged, rows.astype(out_ref.dtype))
            triton.store(out_ref.at[batch, to[:, None], channel[None, :]], rows, mask=alive[:, None] & fits)
        return tile + programs, begun(tile + programs)

    start = program_id(2)
    jax.lax.while_loop(lambda carry: carry[1], copy, (start, begun(start)))


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
