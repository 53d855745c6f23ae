"""H2O: heavy hitters, the tokens that all queries so far attended to most, beside recent ones.

Attention summed over queries follows a power law, so few tokens carry most of it. Half of the
budget goes to the newest tokens, half to the largest sums.

State: one float per slot, the attention received so far, summed over queries and averaged over
the query heads of the group. Favours early tokens, which more queries have seen.

Source: arXiv 2306.14048, algorithm 1. Deviations: the prompt is evicted at its end and not while
it is read; a group's query heads share one set of slots. kvpress has no H2O: its ObservedAttention
divides each sum by the number of queries that could see the token and protects nothing; the sums
themselves are tested to be equal.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from kvjax import eviction
from kvjax.attend import weights
from kvjax.cache import KV
from kvjax.method import Budget, CacheMethod
from kvjax.shapes import Positions, Queries, Slots, Tokens

__all__ = ["H2O"]


@dataclass(frozen=True)
class H2O(CacheMethod):
    """Keeps the heaviest hitters and the newest tokens. aux: attention received per slot, [B R].

    recent: share of the budget that goes to the newest tokens.
    """

    budget: Budget
    recent: float = 0.5
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises ValueError for a share outside [0, 1)."""
        super().__post_init__()
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent is a share of the budget in [0, 1), got {self.recent=}")

    def moved(self, kv: KV, idx) -> KV:
        """Starts with no attention, then carries it along."""
        return kv.replace(aux=jnp.zeros_like(kv.mass)) if idx is None else super().moved(kv, idx)

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Adds the attention of the new queries, and starts new slots from nothing."""
        batch = jnp.arange(idx.shape[0])[:, None, None]
        fresh = kv.aux.at[batch, idx].set(0.0, mode="drop")
        received = weights(kv, q, pos).mean(1).sum(1)
        return kv.replace(aux=fresh + received)

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Keeps the newest tokens and the largest sums."""
        budgets = self.budgets(kv.layer)
        score = eviction.protect_recent(kv, kv.aux, [int(b * self.recent) for b in budgets])
        kv, idx = eviction.by_score(kv, score, budgets)
        return kv if idx is None else self.moved(kv, idx)
