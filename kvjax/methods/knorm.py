"""Knorm: keeps the keys of the smallest norm.

Keys of small L2 norm tend to receive much attention, so a key alone tells its worth and no query
is needed.

State: one float per slot, the norm (rotation leaves it as it is). Cannot follow what is asked.

Source: arXiv 2406.11430, section 3. Deviation: the norm ranks the prompt, as in kvpress; generated
tokens rank above it, the oldest lowest, so each takes the place of the prompt's largest norm. (With
generated tokens ranked by norm too, the newest is often the first to go and text falls apart.)
Kept positions equal those of kvpress 0.5.5.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from kvjax import cache, eviction, storage
from kvjax.cache import KV
from kvjax.method import Budget, CacheMethod
from kvjax.shapes import Positions, Queries, Slots, Tokens

__all__ = ["Knorm"]


@dataclass(frozen=True)
class Knorm(CacheMethod):
    """Evicts the largest key norms. aux: key norm per slot, [B R]."""

    budget: Budget
    evicts: ClassVar[bool] = True

    def moved(self, kv: KV, idx) -> KV:
        """Starts with no norms, then carries them along."""
        return kv.replace(aux=jnp.zeros_like(kv.mass)) if idx is None else super().moved(kv, idx)

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Takes the norms of a prompt's keys; a decode step's token ranks above them."""
        batch = jnp.arange(idx.shape[0])[:, None, None]
        if idx.shape[2] == 1:
            rank = jnp.broadcast_to(-(1.0 + pos)[:, None, :], idx.shape)
            return kv.replace(aux=kv.aux.at[batch, idx].set(rank, mode="drop"))
        flat = jnp.where(idx < kv.mass.shape[1], idx, -1).reshape(idx.shape[0], -1)
        norm = jnp.linalg.norm(cache.take(storage.read(kv.k), flat).astype(jnp.float32), axis=-1)
        return kv.replace(aux=kv.aux.at[batch, idx].set(norm.reshape(idx.shape), mode="drop"))

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Keeps the smallest norms."""
        kv, idx = eviction.by_score(kv, -kv.aux, self.budgets(kv.layer))
        return kv if idx is None else self.moved(kv, idx)
