"""Bounds of blocks head by head: the specification of the kernels."""

import jax.numpy as jnp

__all__ = ["run"]


def run(k, mass, *, slots, block):
    """Returns (low, high), [B N D] each."""
    low, high, row = [], [], 0
    for size in slots:
        fill = -size % block
        keys = jnp.pad(k[:, row : row + size], ((0, 0), (0, fill), (0, 0)))
        alive = jnp.pad(mass[:, row : row + size], ((0, 0), (0, fill))) > 0
        keys = keys.reshape(k.shape[0], -1, block, k.shape[2])
        alive = alive.reshape(*keys.shape[:3], 1)
        low.append(jnp.where(alive, keys, jnp.inf).min(2))
        high.append(jnp.where(alive, keys, -jnp.inf).max(2))
        row += size
    return jnp.concatenate(low, axis=1).astype(k.dtype), jnp.concatenate(high, axis=1).astype(k.dtype)
