"""Writes rows by XLA: a run of each head is read, changed and written back."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import starts
from pallas_kernels.host import RUN, on_host

__all__ = ["run"]


def run(far, staged, first, end, *, slots: tuple[int, ...]):
    """Returns the rows [B R D], where far lies."""
    batch, n_heads, window, size = staged.shape
    flat, host = far.reshape(-1, size), on_host(far)
    n = min(-(-window // RUN) * RUN + RUN, len(flat))  # whole tiles, wherever the rows begin
    head = jnp.arange(batch)[:, None] * far.shape[1] + jnp.asarray(starts(slots)[:-1])
    begin, stop = head + first, head + jnp.minimum(end, jnp.asarray(slots))

    def change(i, flat):
        place = (i // n_heads, i % n_heads)
        at = jnp.clip(begin[place] // RUN * RUN, 0, len(flat) - n)
        old = jax.lax.dynamic_slice(flat, (at, 0), (n, size))
        old = jax.device_put(old, jax.memory.Space.Device) if host else old
        row = at + jnp.arange(n)
        new = staged[place][jnp.clip(row - begin[place], 0, window - 1)]
        here = (row >= begin[place]) & (row < stop[place])
        new = jnp.where(here[:, None], new, old)
        new = jax.device_put(new, jax.memory.Space.Host) if host else new
        return jax.lax.dynamic_update_slice(flat, new, (at, 0))

    return jax.lax.fori_loop(0, batch * n_heads, change, flat).reshape(far.shape)
