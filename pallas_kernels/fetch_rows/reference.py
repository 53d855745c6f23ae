"""Copies by gather and scatter, block by block from host memory: the specification of the kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Codes, decode_codes, starts
from pallas_kernels.host import Blocks, Pages, as_rows, take_rows, unpaired

__all__ = ["run"]


def run(near, far, staged, idx, line, first, *, blocks: Blocks):
    """Returns the lines of keys and of values [B Q D]."""
    (batch, n_heads, window, _), slots, block = staged[0].shape, blocks.slots, blocks.size
    slot = idx[..., None] * block + jnp.arange(block)  # [B K N P]
    late = slot - first[:, :, None, None]
    alive = (idx >= 0)[..., None] & (line >= 0)[..., None]
    alive = alive & (slot < jnp.asarray(slots)[:, None, None]) & (late < window)
    row = starts(slots)[:-1, None, None] + jnp.clip(slot, 0, jnp.asarray(slots)[:, None, None] - 1)
    b, k = jnp.arange(batch)[:, None, None, None], jnp.arange(n_heads)[:, None, None]
    per_head = near[0].shape[1] // n_heads
    to = jnp.where(alive, k * per_head + line[..., None] * block + jnp.arange(block), near[0].shape[1])
    old = _rows(far, row, tuple(2 * s for s in slots))
    out = []
    for i, (x, new) in enumerate(zip(near, staged, strict=True)):
        new = new[b, k, jnp.clip(late, 0, window - 1)]
        rows = jnp.where((late >= 0)[..., None], new, old[..., i, :].astype(x.dtype))
        out.append(x.at[b, to].set(rows, mode="drop"))
    return tuple(out)


def _rows(far, row, slots: tuple[int, ...]):
    """Returns keys and values [B K N P 2 D] of a store at packed rows [B K N P]; `slots` counts both."""
    if isinstance(far, Codes):
        parts = (take_rows(x, row) for x in (far.codes, far.scale, far.zero))
        rows = decode_codes(unpaired(Codes(*parts, far.bits, None)), slots)
    else:
        if isinstance(far, Pages):
            far = as_rows(jax.device_put(far, jax.memory.Space.Device), slots)
        rows = take_rows(far, (2 * row[..., None] + jnp.arange(2)).reshape(*row.shape[:-1], -1))
    return rows.reshape(*row.shape, 2, -1)
