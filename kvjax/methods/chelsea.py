"""Chelsea: neighbouring tokens with similar keys become one slot, their weighted centroid.

Attention to n tokens with the same key and value is attention to one whose logit has log n added; where
keys are only similar it is nearly so. Nothing is thrown away: a slot's mass counts its tokens, and the
masses sum to the tokens seen.

State: `budget` slots per head, in order of time. A head that is full is clustered down to
budget - slack slots, so the cost of a clustering is shared by `slack` tokens: at the prompt's end,
between chunks of a prompt, and inside the decode loop.

Source: arXiv 2506.11418 (Chelsea, CentroidKV). The matching and its deviations: `kvjax.clustering`.
Unknown in the paper and chosen by `experiments.chelsea sweep`: chunk, sinks, recent tokens, slack.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from kvjax import cache, clustering
from kvjax.cache import KV
from kvjax.clustering import Matching
from kvjax.method import Budget, CacheMethod
from kvjax.shapes import Positions, Queries, Slots, Tokens

__all__ = ["Chelsea"]

_SLACK = (8, 256)  # slots
_SHORT_CHUNK = 32  # slots: a head that is shorter than a chunk is one chunk


@dataclass(frozen=True)
class Chelsea(CacheMethod):
    """Merges tokens with similar keys. aux: tokens per slot, [B R], without log_n; else none.

    Args:
        chunk: slots inside which matches are sought.
        stride: one of so many slots is a destination; a pass leaves at least 1/stride.
        similarity: "cosine", "l2" or "dot".
        before_rope: compare and average keys before their rotation.
        log_n: add the logarithm of its tokens to a slot's logit.
        n_sinks: first tokens that never merge.
        n_recent: newest tokens that never merge, at least.
        recent: the share of a head's slots that its newest tokens have, if that is more.
        slack: slots that a clustering leaves free; None is a 32nd of the smallest budget, from 8 to 256.
        rounds: passes of a clustering, None for as many as the ratio needs.
    """

    budget: Budget
    chunk: int = 256
    stride: int = 2
    similarity: str = "cosine"
    before_rope: bool = True
    log_n: bool = True
    n_sinks: int = 4
    n_recent: int = 60
    recent: float = 0.0
    slack: int | None = None
    rounds: int | None = None
    evicts: ClassVar[bool] = True
    stays: ClassVar[str] = "sinks, recent tokens, and a short chunk or slack"

    def __post_init__(self) -> None:
        """Raises ValueError for settings that leave nothing to merge."""
        super().__post_init__()
        if not 2 <= self.stride <= self.chunk:
            raise ValueError(
                f"a chunk has sources and a destination: 2 <= stride <= chunk, got {self.stride=}, "
                f"{self.chunk=}"
            )
        if self.similarity not in ("cosine", "dot", "l2"):
            raise ValueError(f"similarity is cosine, dot or l2, got {self.similarity=}")
        if self.n_sinks < 0 or self.n_recent < 1 or (self.slack is not None and self.slack < 1):
            raise ValueError(
                f"n_sinks is at least 0, n_recent and slack are at least 1, got {self.n_sinks=}, "
                f"{self.n_recent=}, {self.slack=}"
            )
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent is a share of the slots, at least 0 and below 1, got {self.recent=}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"a clustering has at least 1 round, got {self.rounds=}: None finds the number")

    @property
    def n_free(self) -> int:
        """The slack, in slots."""
        if self.slack is not None:
            return self.slack
        return int(np.clip(np.min(self.budget) // 32, *_SLACK))

    @property
    def least(self) -> int:
        """Slots that a head has at least: for what stays, and to merge in, a chunk or what of it will do."""
        return self.n_sinks + self.n_recent + max(min(self.chunk, _SHORT_CHUNK), self.n_free)

    @property
    def matching(self) -> Matching:
        """How slots are matched."""
        return Matching(
            self.chunk, self.stride, self.similarity, self.before_rope, self.n_sinks, self.n_recent,
            self.recent,
        )  # fmt: skip

    def moved(self, kv: KV, idx) -> KV:
        """Without log_n, counts one token a slot, then carries the counts along."""
        if self.log_n:
            return kv
        return kv.replace(aux=jnp.ones_like(kv.mass)) if idx is None else super().moved(kv, idx)

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Without log_n, counts one token for each new slot."""
        if self.log_n:
            return kv
        return kv.replace(aux=kv.aux.at[jnp.arange(idx.shape[0])[:, None, None], idx].set(1.0, mode="drop"))

    def due(self, kv: KV) -> Bool[Array, "B K"]:
        """Returns which heads are full."""
        return kv.fill >= jnp.asarray(self.budgets(kv.layer))

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Clusters the heads that are full, if there are any.

        Raises:
            ValueError: where the rounds cannot reach the budget.
        """
        budgets = self.budgets(kv.layer)
        slots = tuple(min(b, s) for b, s in zip(budgets, kv.slots, strict=True))
        goal = [b - self.n_free if s >= b else s for s, b in zip(kv.slots, budgets, strict=True)]
        if all(s == g for s, g in zip(kv.slots, goal, strict=True)):
            return kv  # serves fewer tokens than the budget
        for s, g in zip(kv.slots, goal, strict=True):
            self._check(s, g)
        n = kv.mass if self.log_n else jnp.where(kv.mass > 0, kv.aux, 0.0)
        full = cache.count(kv) >= jnp.asarray(budgets)
        kv, n = clustering.reduce(kv, n, goal, full, self.matching, self.rounds, slots)
        return kv if self.log_n else kv.replace(aux=n, mass=jnp.minimum(kv.mass, 1.0))

    def _check(self, size: int, goal: int) -> None:
        """Raises ValueError where the rounds cannot bring a head of `size` slots to its goal."""
        if size == goal or clustering.plan(size, goal, self.matching, self.rounds)[-1] <= goal:
            return
        needed = clustering.plan(size, goal, self.matching)
        raise ValueError(
            f"the rounds bring a head to budget - slack = {goal} slots, got {self.rounds=} for {size}: "
            + (
                f"rounds={len(needed)} would, or None"
                if needed[-1] <= goal
                else "none would; raise the budget, or lower slack"
            )
        )
