"""Copies by gather and scatter, block by block from host memory: the specification of the kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Codes, decode_codes, starts
from pallas_kernels.host import Blocks, Pages, as_rows, take_rows

__all__ = ["run"]


def run(near, far, staged, idx, line, first, *, blocks: Blocks):
    """Returns the lines [B Q D]."""
    (batch, n_heads, window, _), slots, block = staged.shape, blocks.slots, blocks.size
    slot = idx[..., None] * block + jnp.arange(block)  # [B K N P]
    late = slot - first[:, :, None, None]
    alive = (idx >= 0)[..., None] & (line >= 0)[..., None]
    alive = alive & (slot < jnp.asarray(slots)[:, None, None]) & (late < window)
    row = starts(slots)[:-1, None, None] + jnp.clip(slot, 0, jnp.asarray(slots)[:, None, None] - 1)
    b, k = jnp.arange(batch)[:, None, None, None], jnp.arange(n_heads)[:, None, None]
    new = staged[b, k, jnp.clip(late, 0, window - 1)]
    rows = jnp.where((late >= 0)[..., None], new, _rows(far, row, slots).astype(near.dtype))
    per_head = near.shape[1] // n_heads
    to = jnp.where(alive, k * per_head + line[..., None] * block + jnp.arange(block), near.shape[1])
    return near.at[b, to].set(rows, mode="drop")


def _rows(far, row, slots: tuple[int, ...]):
    """Returns the rows of a store at row [B K N P]."""
    if isinstance(far, Pages):
        far = as_rows(jax.device_put(far, jax.memory.Space.Device), slots)
    if not isinstance(far, Codes):
        return take_rows(far, row)
    parts = (take_rows(x, row) for x in (far.codes, far.scale, far.zero))
    return decode_codes(Codes(*parts, far.bits, None), slots)
