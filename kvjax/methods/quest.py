"""Quest: keeps everything and reads, at each step, the pages that can matter to the query.

A page of keys has a minimum and a maximum per channel, which bound q·k from above for any query;
the pages of the highest bounds are read, the others are left where they are.

State: two vectors [D] per page of P slots, 1/P of the key bytes each. Holds the whole cache:
it saves reads, not memory.

Source: arXiv 2406.10774, sections 3.2 and 3.3; the first two layers are read in full. Deviation: a
KV head's query heads share its pages, ranked by the largest bound in the group. kvpress has none.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import cache, storage
from kvjax.attend import Selection
from kvjax.cache import KV
from kvjax.method import Budget, CacheMethod
from kvjax.rope import rotate
from kvjax.shapes import Positions, Queries, Slots, Tokens
from pallas_kernels import block_bounds, bound_scores, select_topk

__all__ = ["Quest"]


@dataclass(frozen=True)
class Quest(CacheMethod):
    """Reads `budget` tokens per step, in pages. aux: (low, high) per page, [B N D] each.

    budget None reads all, which is what layers below `dense_layers` do.
    """

    budget: Budget | None
    page: int = 16
    dense_layers: int = 2
    evicts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises ValueError for a page of no tokens."""
        super().__post_init__()
        if self.page < 1:
            raise ValueError(f"a page has at least 1 token, got {self.page=}")

    def for_layer(self, index: int, n_layers: int) -> "Quest":
        """Returns the method of one layer; the first ones read everything."""
        sparse = super().for_layer(index, n_layers)
        return replace(sparse, budget=None) if index < self.dense_layers else sparse

    def moved(self, kv: KV, idx) -> KV:
        """Makes all bounds anew."""
        if self.budget is None:
            return kv
        keys = storage.read(kv.k)
        return kv.replace(aux=block_bounds(keys, kv.mass, slots=kv.slots, block=self.page))

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Makes the bounds of the written pages anew: of one page per head in a decode step."""
        if self.budget is None:
            return kv
        if idx.shape[2] > 1:
            return self.moved(kv, None)
        first = jnp.asarray(cache.starts(kv.slots))[None, :]
        place = jnp.clip(idx[..., 0] - first, 0, jnp.asarray(kv.slots) - 1)  # [B K]
        start = place - place % self.page
        slot = start[..., None] + jnp.arange(self.page)
        inside = slot < jnp.asarray(kv.slots)[None, :, None]
        rows = jnp.where(inside, first[..., None] + slot, -1).reshape(idx.shape[0], -1)
        shape = (*slot.shape, -1)
        keys = cache.take(storage.read(kv.k), rows).reshape(shape).astype(jnp.float32)
        low, high = _bounds(keys, cache.take(kv.mass, rows).reshape(shape) > 0, kv)
        n_pages = [-(-s // self.page) for s in kv.slots]
        page = start // self.page + jnp.asarray(cache.starts(n_pages))[None, :]
        batch = jnp.arange(idx.shape[0])[:, None]
        return kv.replace(aux=(kv.aux[0].at[batch, page].set(low), kv.aux[1].at[batch, page].set(high)))

    def select(self, kv: KV, q: Queries, pos: Positions) -> Selection | None:
        """Returns the pages of the highest bound; prompts (T > 1) read all."""
        if self.budget is None or q.shape[1] > 1:
            return None
        q = rotate(q, jnp.broadcast_to(pos[:, :, None, None], q.shape[:4]), kv.layer.rope)[:, 0]
        n_pages = tuple(-(-s // self.page) for s in kv.slots)
        wanted = [
            min(max(b // self.page, 1), n) for b, n in zip(self.budgets(kv.layer), n_pages, strict=True)
        ]
        bound = bound_scores(q, *kv.aux, n_blocks=n_pages)
        chosen, here = [], _newest(kv) // self.page  # the page being written ranks highest
        for run in cache.runs(n_pages, wanted):
            newest = here[:, run.head : run.head + run.n, None]
            score = cache.view(bound, run)
            score = jnp.where((jnp.arange(run.size) == newest) & (score > -jnp.inf), jnp.inf, score)
            best = select_topk(score, wanted[run.head])
            room = ((0, 0), (0, 0), (0, max(wanted) - wanted[run.head]))
            chosen.append(jnp.pad(best, room, constant_values=-1))
        return Selection(idx=jnp.concatenate(chosen, axis=1), block=self.page)


def _bounds(keys: Array, alive: Array, kv: KV) -> tuple[Array, Array]:
    """Returns (low, high) over the slots of each page; an empty page has low > high."""
    dtype = storage.dtype(kv.k)
    low = jnp.where(alive, keys, jnp.inf).min(-2)
    high = jnp.where(alive, keys, -jnp.inf).max(-2)
    return low.astype(dtype), high.astype(dtype)


def _newest(kv: KV) -> Int[Array, "B K"]:
    """Returns the slot of the newest token of each head."""
    parts = []
    for run in cache.runs(kv.slots):
        when = jnp.where(cache.view(kv.mass, run) > 0, cache.view(kv.pos, run), -1)
        parts.append(jnp.argmax(when, axis=-1))
    return jnp.concatenate(parts, axis=1)
