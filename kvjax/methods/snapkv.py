"""SnapKV: keeps what the last queries of the prompt look at, and those queries' own window.

What a model will read while it answers is what the end of the prompt already reads, and it comes
in clusters: attention of the last `window` queries, pooled over neighbouring keys, votes for the
tokens to keep. Ranking happens once, when the prompt ends.

State: one float per slot, the vote. Generated tokens count towards the budget: each takes the
place of the token with the fewest votes, so after n of them the prompt's part of the cache is
that of SnapKV with a budget of budget - n. Cannot serve a question that the prompt's end did not
contain.

Source: arXiv 2404.14469, section 4.1. Deviations: mean pooling, as kvpress (the paper: max), and
votes averaged over a group's query heads. Kept positions equal those of kvpress 0.5.5 with the
same settings.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax import cache, eviction
from kvjax.attend import weights
from kvjax.cache import KV
from kvjax.method import Budget, CacheMethod
from kvjax.shapes import Packed, Positions, Queries, Slots, Tokens

__all__ = ["SnapKV"]


@dataclass(frozen=True)
class SnapKV(CacheMethod):
    """Keeps the tokens that the last `window` queries vote for. aux: votes per slot, [B R].

    kernel: tokens over which votes are averaged, odd.
    """

    budget: Budget
    window: int = 32
    kernel: int = 5
    evicts: ClassVar[bool] = True
    stays: ClassVar[str] = "more than its window"

    def __post_init__(self) -> None:
        """Raises ValueError for a window below 2 or an even kernel."""
        super().__post_init__()
        if self.window < 2 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window is at least 2 and kernel odd, got {self.window=} and {self.kernel=}")

    @property
    def n_queries(self) -> int:
        """The observation window."""
        return self.window

    @property
    def least(self) -> int:
        """The window and a slot."""
        return self.window + 1

    def moved(self, kv: KV, idx) -> KV:
        """Starts with no votes, then carries them along."""
        return kv.replace(aux=jnp.zeros_like(kv.mass)) if idx is None else super().moved(kv, idx)

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Ranks new tokens above every voted one, the oldest lowest."""
        batch = jnp.arange(idx.shape[0])[:, None, None]
        rank = jnp.broadcast_to((1.0 + pos)[:, None, :], idx.shape)
        return kv.replace(aux=kv.aux.at[batch, idx].set(rank, mode="drop"))

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Votes after a prompt; evicts the fewest votes."""
        if q.shape[1] > 1:
            kv = kv.replace(aux=self._votes(kv, q[:, -self.window :], pos[:, -self.window :]))
        kv, idx = eviction.by_score(kv, kv.aux, self.budgets(kv.layer))
        return kv if idx is None else self.moved(kv, idx)

    def _votes(self, kv: KV, q: Queries, pos: Positions) -> Packed:
        """Returns pooled attention of the window's queries, in [0, 1]; the window ranks above."""
        seen = kv.seen[:, None]
        window = kv.pos >= seen - self.window
        received = weights(kv, q, pos).mean(1).sum(1) / self.window
        received = jnp.where(window | (kv.mass == 0), 0.0, received)
        pooled = [_mean_pool(cache.view(received, run), self.kernel) for run in cache.runs(kv.slots)]
        votes = jnp.concatenate([p.reshape(p.shape[0], -1) for p in pooled], axis=1)
        return jnp.where(window, 1.0 + kv.pos, votes)


def _mean_pool(x: jax.Array, kernel: int) -> jax.Array:
    """Averages over `kernel` neighbours along the last axis, zeros outside."""
    size = (1,) * (x.ndim - 1) + (kernel,)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, size, (1,) * x.ndim, "SAME")
    return total / kernel
