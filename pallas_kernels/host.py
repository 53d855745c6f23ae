"""Reads rows of arrays that may lie in host memory, by XLA alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

__all__ = ["RUN", "Blocks", "on_host", "take_rows"]

RUN = 32  # rows in a tile of the smallest type: what a TPU reads and writes as a whole


@dataclass(frozen=True)
class Blocks:
    """How rows that are moved together lie: capacity of each KV head, and slots per block."""

    slots: tuple[int, ...]
    size: int = 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks of each head, the last of which may be cut short."""
        return tuple(-(-s // self.size) for s in self.slots)


def on_host(*trees: object) -> bool:
    """Says whether any array lies in host memory.

    Example:
        >>> on_host(jnp.ones(2)), on_host(jax.device_put(jnp.ones(2), jax.memory.Space.Host))
        (False, True)
    """
    spaces = (jax.typeof(x).memory_space for x in jax.tree.leaves(trees))
    return jax.memory.Space.Host in spaces


def take_rows(x: Array, at: Int[Array, "B *n P"]) -> Array:
    """Returns rows of x [B R E], on the device; of an array on the host, P at a time, which lie together."""
    if not on_host(x):
        return jax.vmap(lambda rows, i: rows[i])(x, at)
    # XLA gathers from no host array, but reads slices of one, along one axis and (on TPU) in whole tiles.
    flat = x.reshape(-1, x.shape[2])
    n = min(-(-at.shape[-1] // RUN) * RUN + RUN, len(flat))
    at = at + (jnp.arange(len(at)) * x.shape[1]).reshape(-1, *(1,) * (at.ndim - 1))

    def read(_, rows):
        first = jnp.minimum(rows[0] // RUN * RUN, len(flat) - n)
        run = jax.lax.dynamic_slice(flat, (first, 0), (n, x.shape[2]))
        return None, jax.device_put(run, jax.memory.Space.Device)[rows - first]

    return jax.lax.scan(read, None, at.reshape(-1, at.shape[-1]))[1].reshape(*at.shape, -1)
