"""KIVI: stores keys and values in 8 or 4 bits, with the newest tokens in full precision.

Keys have outlier channels, values do not: so keys are quantised per channel over blocks of tokens
and values per token.

State: codes for every slot, one scale and zero per channel and key block and per value token, and
a ring of `window` recent tokens. Saves memory, drops nothing; composes with eviction and
selection: `chain(SnapKV(budget=512), KIVI(bits=4))`.

Source: arXiv 2402.02750, section 3.3. Deviations: values have one scale per token and head (the
release: one per 32 channels); recent tokens are quantised too, so that any slot can be
overwritten, but read from the ring. The prompt is read in full precision and quantised at its
end, as in the paper. kvpress has no storage methods.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from kvjax import storage
from kvjax.cache import KV
from kvjax.method import CacheMethod
from kvjax.shapes import Positions, Queries

__all__ = ["KIVI"]


@dataclass(frozen=True)
class KIVI(CacheMethod):
    """Quantises storage to `bits`. block: tokens per key scale; window: recent tokens kept exact."""

    bits: int = 8
    block: int = 32
    window: int = 32

    def __post_init__(self) -> None:
        """Raises ValueError for other widths than 4 and 8 bits, or a window that cannot cover a block."""
        if self.bits not in (4, 8):
            raise ValueError(f"codes have 4 or 8 bits, got {self.bits=}")
        if not 1 <= self.block <= self.window:
            raise ValueError(f"the window covers at least one block, got {self.window=} and {self.block=}")

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Quantises a full-precision state; a quantised one stays."""
        if isinstance(kv.k, storage.Quantized):
            return kv
        keys = {"bits": self.bits, "block": self.block, "window": self.window, "slots": kv.slots}
        values = keys | {"block": None}
        order = kv.pos.astype(jnp.float32)
        return kv.replace(
            k=storage.quantize(kv.k, kv.mass, order, keys),
            v=storage.quantize(kv.v, kv.mass, order, values),
        )
