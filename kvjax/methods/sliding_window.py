"""Keeps the window of a sliding-window layer in a ring: exact, since older tokens are masked anyway.

Not a method to choose: layers whose model has a window (Gemma, Mistral) use it whatever the
method of the others is.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvjax import eviction
from kvjax.cache import KV, Layer
from kvjax.method import CacheMethod
from kvjax.shapes import Positions, Queries, Slots, Tokens

__all__ = ["SlidingWindow"]


@dataclass(frozen=True)
class SlidingWindow(CacheMethod):
    """Keeps the newest `window` tokens of a layer that has one."""

    evicts: ClassVar[bool] = True

    def budgets(self, layer: Layer) -> tuple[int, ...]:
        """Returns the layer's window for every KV head."""
        return (layer.window,) * layer.n_kv_heads

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Turns the ring."""
        return eviction.wrap(kv, 0) if kv.slots == self.slots(kv.layer, max(kv.slots)) else kv

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Keeps the newest tokens."""
        return eviction.ring(kv, self.budgets(kv.layer), 0)
