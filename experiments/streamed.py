"""A full cache that lies on a host and a disk, all of which every step reads."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp

from kvjax import cache, tiers
from kvjax.cache import KV, Layer
from kvjax.chunk_files import Layout
from kvjax.disk import Remote
from kvjax.method import CacheMethod

__all__ = ["Streamed"]


@dataclass(frozen=True)
class Streamed(CacheMethod):
    """Reads every row in every step: some layers' from pinned host memory, the others' from a disk."""

    folder: str | None = field(default=None, compare=False)
    chunk: int = 64
    resident: int = 0  # layers on the host
    ahead: bool = False
    tier: ClassVar[str] = "disk"

    def for_layer(self, index: int, n_layers: int) -> "Streamed":
        """Returns the method of one layer."""
        return dataclasses.replace(self, resident=int(index < self.resident))

    def init(self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any) -> KV:
        """Returns an empty state."""
        least = Layout(batch, layer.n_kv_heads, max(slots), layer.head_dim, dtype, self.chunk).stride
        remote = None if self.resident else Remote(jnp.int32(-1), self.chunk, least, False, self.ahead)
        return cache.allocate(layer, batch, slots, dtype, host=tiers.Host(1, remote=remote))
