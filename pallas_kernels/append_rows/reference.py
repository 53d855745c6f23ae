"""Writes rows by XLA: one scatter for each store."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import starts
from pallas_kernels.backend import in_hbm
from pallas_kernels.rotate_rows.reference import rotated

__all__ = ["counted", "run"]


def run(stores, rows, fill, seen, order, turn, *, slots: tuple[int, ...]):
    """Returns the stores, fill, seen, and the turned vectors."""
    slot = fill[:, :, None] + order[:, None, :]  # [B K T]
    room = (order >= 0)[:, None, :] & (slot < jnp.asarray(slots)[None, :, None])
    at = jnp.where(room, slot + jnp.asarray(starts(slots)[:-1])[None, :, None], sum(slots))
    batch = jnp.arange(len(order))[:, None, None]

    def write(store, new):
        done = store.at[batch, at].set(new, mode="drop")
        return in_hbm(done) if store.ndim == 3 else done

    vectors = None
    if turn is not None:
        flat, tree = jax.tree.flatten(rows)
        angles = [x[:, None] for x in (turn.cos, turn.sin)]  # [B 1 T D/2]
        flat = [_turned(x, *angles) if of else x for x, of in zip(flat, turn.stores, strict=True)]
        rows = tree.unflatten(flat)
        angles = [x[:, :, None, None] for x in (turn.cos, turn.sin)]  # [B T 1 1 D/2]
        vectors = jax.tree.map(lambda x: _turned(x, *angles), turn.vectors)
    return jax.tree.map(write, stores, rows), *counted(fill, seen, order, slots), vectors


def _turned(x, cos, sin):
    return rotated(x.astype(jnp.float32), cos, sin).astype(x.dtype)


def counted(fill, seen, order, slots: tuple[int, ...]):
    """Returns fill [B K] and seen [B] after new tokens."""
    taken = jnp.sum(order >= 0, axis=1, dtype=jnp.int32)
    return jnp.minimum(fill + taken[:, None], jnp.asarray(slots, jnp.int32)), seen + taken
