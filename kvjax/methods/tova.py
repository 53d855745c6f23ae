"""TOVA: evicts what the newest query attends to least.

A decoder seen as a multi-state RNN drops, at every step, the state with the lowest attention
weight of the current query, averaged over the heads of the layer.

State: nothing beside the slots. Cannot keep what is asked for only later.

Source: arXiv 2401.06104, section 3. Deviations: the prompt is read densely and
evicted at its end, as kvpress does; the newest token is never evicted. With a budget table heads
hold different tokens, so each KV head ranks by its own queries.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from kvjax import eviction
from kvjax.attend import weights
from kvjax.cache import KV
from kvjax.method import Budget, CacheMethod
from kvjax.shapes import Positions, Queries

__all__ = ["TOVA"]


@dataclass(frozen=True)
class TOVA(CacheMethod):
    """Evicts the lowest attention weight of the newest query."""

    budget: Budget
    evicts: ClassVar[bool] = True
    couples_heads: ClassVar[bool] = True

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Keeps what the newest query attends to."""
        budgets = self.budgets(kv.layer)
        score = weights(kv, q[:, -1:], pos[:, -1:]).mean(axis=(1, 2))  # [B R]
        if len(set(budgets)) == 1:
            heads = score.reshape(score.shape[0], kv.layer.n_kv_heads, -1)
            score = jnp.broadcast_to(heads.mean(1, keepdims=True), heads.shape).reshape(score.shape)
        score = eviction.protect_recent(kv, score, [1] * len(kv.slots))
        return eviction.by_score(kv, score, budgets)[0]
