"""Writes rows by XLA: one scatter for each store."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import starts
from pallas_kernels.backend import in_hbm

__all__ = ["counted", "run"]


def run(stores, rows, fill, seen, order, *, slots: tuple[int, ...]):
    """Returns the stores, fill and seen."""
    slot = fill[:, :, None] + order[:, None, :]  # [B K T]
    room = (order >= 0)[:, None, :] & (slot < jnp.asarray(slots)[None, :, None])
    at = jnp.where(room, slot + jnp.asarray(starts(slots)[:-1])[None, :, None], sum(slots))
    batch = jnp.arange(len(order))[:, None, None]

    def write(store, new):
        done = store.at[batch, at].set(new, mode="drop")
        return in_hbm(done) if store.ndim == 3 else done

    return jax.tree.map(write, stores, rows), *counted(fill, seen, order, slots)


def counted(fill, seen, order, slots: tuple[int, ...]):
    """Returns fill [B K] and seen [B] after new tokens."""
    taken = jnp.sum(order >= 0, axis=1, dtype=jnp.int32)
    return jnp.minimum(fill + taken[:, None], jnp.asarray(slots, jnp.int32)), seen + taken
