"""StreamingLLM: the first tokens as attention sinks, and a sliding window of the newest.

Softmax needs somewhere to put weight it has no use for, and models learn to put it on the first
tokens; with those kept, a window of recent tokens stays fluent for any length. Positions are
those inside the cache: the sinks stand directly before the window.

State: `budget` slots in a ring, keys un-rotated. Renumbering is done on the sinks: only relative
positions enter attention, so the sinks' positions move up as the window slides and the window
keeps its own. Cannot recall anything that left the window.

Source: arXiv 2309.17453, section 3.2. Deviation: the prompt is prefilled densely when it is
given at once, as kvpress does; with compression between chunks it streams.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from kvjax import eviction
from kvjax.cache import KV
from kvjax.method import Budget, CacheMethod
from kvjax.shapes import Positions, Queries, Slots, Tokens

__all__ = ["StreamingLLM"]


@dataclass(frozen=True)
class StreamingLLM(CacheMethod):
    """Keeps n_sinks first tokens and the newest budget - n_sinks."""

    budget: Budget
    n_sinks: int = 4
    rotated: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    stays: ClassVar[str] = "the sinks and a recent token"

    def __post_init__(self) -> None:
        """Raises ValueError for fewer than 0 sinks."""
        super().__post_init__()
        if self.n_sinks < 0:
            raise ValueError(f"n_sinks is at least 0, got {self.n_sinks=}")

    @property
    def least(self) -> int:
        """The sinks and a recent token."""
        return self.n_sinks + 1

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Turns the ring and moves the sinks up to it."""
        if any(s > b for s, b in zip(kv.slots, self.budgets(kv.layer), strict=True)):
            return kv  # a prompt larger than the budget is being read; nothing has slid yet
        return eviction.wrap(self._renumber(kv), self.n_sinks)

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Keeps the sinks and the newest tokens."""
        return self._renumber(eviction.ring(kv, self.budgets(kv.layer), self.n_sinks))

    def _renumber(self, kv: KV) -> KV:
        """Sets the sinks' positions to end where the window begins."""
        pos = []
        for s in kv.slots:
            slid = jnp.maximum(kv.seen - s, 0)[:, None]
            pos.append(jnp.arange(s)[None, :] + slid)
        sink = jnp.concatenate([jnp.arange(s) < self.n_sinks for s in kv.slots])[None, :]
        return kv.replace(pos=jnp.where(sink, jnp.concatenate(pos, axis=1), kv.pos).astype(jnp.int32))
