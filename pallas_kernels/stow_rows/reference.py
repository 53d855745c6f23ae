"""Writes rows by XLA: a run of each head, or its pages, are read, changed and written back."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import starts
from pallas_kernels.host import RUN, Blocks, Pages, on_host, pack, unpack

__all__ = ["run"]


def run(far, staged, first, end, *, slots: tuple[int, ...]):
    """Returns the rows, as far holds them and where it lies."""
    if isinstance(far, Pages):
        words = _write(far.words, staged, first, end, Blocks(slots, far.block))
        return far.replace(words=words)
    return _write(far, staged, first, end, Blocks(slots))


def _write(far, staged, first, end, blocks: Blocks):
    """Writes to rows [B R D], or to the words of pages."""
    (batch, n_heads, window, size), per, host = staged.shape, blocks.size, on_host(far)
    flat = far.reshape(-1, *far.shape[2:])
    tile = per if far.ndim == 4 else RUN  # slots that are read and written as a whole
    n = min(-(-window // tile) * tile + tile, len(flat) * per)  # wherever the rows begin
    head = (jnp.arange(batch)[:, None] * far.shape[1] + jnp.asarray(starts(blocks.counts)[:-1])) * per
    begin, stop = head + first, head + jnp.minimum(end, jnp.asarray(blocks.slots))

    def change(i, flat):
        place = (i // n_heads, i % n_heads)
        at = jnp.clip(begin[place] // tile * tile, 0, len(flat) * per - n)
        old = jax.lax.dynamic_slice_in_dim(flat, at // per, n // per)
        old = jax.device_put(old, jax.memory.Space.Device) if host else old
        row = at + jnp.arange(n)
        new = staged[place][jnp.clip(row - begin[place], 0, window - 1)]
        here = (row >= begin[place]) & (row < stop[place])
        if far.ndim == 4:
            old = unpack(old, staged.dtype, size).reshape(n, size)
        new = jnp.where(here[:, None], new, old)
        if far.ndim == 4:
            new = pack(new.reshape(-1, per, size))
        new = jax.device_put(new, jax.memory.Space.Host) if host else new
        return jax.lax.dynamic_update_slice_in_dim(flat, new, at // per, 0)

    return jax.lax.fori_loop(0, batch * n_heads, change, flat).reshape(far.shape)
