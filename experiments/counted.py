"""Counts what a method's decode steps really read, and finds the budget with which another reads as much.

Shapes bound it from above only, see `measure.bytes_read`: query heads of a group may choose the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from kvjax import attend, cache, measure, spec, states, storage
from kvjax.attend import Selection
from kvjax.cache import KV, Layer
from kvjax.method import CacheMethod
from kvjax.methods import per_layer
from kvjax.model import Model
from kvjax.shapes import Leaf, Positions, Queries, Slots, Tokens
from kvjax.states import State

__all__ = ["Counted", "budget_of", "reads"]


@struct.dataclass
class Counts:
    """A method's own index, and sums over the decode steps."""

    aux: Leaf
    read: Leaf  # [B] int32, slots of all KV heads
    held: Leaf  # [B] int32, slots that are occupied
    steps: Leaf  # [B] int32


@dataclass(frozen=True)
class Counted(CacheMethod):
    """A method that counts the slots which its decode steps read. aux: `Counts`."""

    method: CacheMethod

    @property
    def rotated(self) -> bool:  # type: ignore[override]
        """As the method."""
        return self.method.rotated

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        """As the method."""
        return self.method.evicts

    @property
    def n_queries(self) -> int:
        """As the method."""
        return self.method.n_queries

    def for_layer(self, index: int, n_layers: int) -> "Counted":
        """Returns the method of one layer, which counts."""
        return replace(self, method=self.method.for_layer(index, n_layers))

    def budgets(self, layer: Layer) -> tuple[int, ...]:
        """Returns the method's."""
        return self.method.budgets(layer)

    def init(self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any) -> KV:
        """Returns the method's empty state, with counts of 0."""
        kv = self.method.init(layer, batch, slots, dtype)
        return kv.replace(aux=Counts(kv.aux, *(jnp.zeros(batch, jnp.int32) for _ in range(3))))

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Lets the method refresh its index; in a decode step, counts what it is about to read."""
        own = self.method.observe(_own(kv), q, k, pos, idx)
        counts = kv.aux.replace(aux=own.aux)
        if q.shape[1] == 1:
            there = (pos[:, 0] >= 0).astype(jnp.int32)
            counts = counts.replace(
                read=counts.read + there * _n_read(own, self.method.select(own, q, pos)),
                held=counts.held + there * cache.count(own).sum(-1),
                steps=counts.steps + there,
            )
        return own.replace(aux=counts)

    def due(self, kv: KV) -> jax.Array | None:
        """As the method."""
        return self.method.due(_own(kv))

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Lets the method compress."""
        return _counting(kv, self.method.compress(_own(kv), q, pos))

    def select(self, kv: KV, q: Queries, pos: Positions) -> Selection | None:
        """Returns what the method selects."""
        return self.method.select(_own(kv), q, pos)

    def moved(self, kv: KV, idx: jax.Array | None) -> KV:
        """Lets the method refresh its index."""
        return _counting(kv, self.method.moved(_own(kv), idx))


def _own(kv: KV) -> KV:
    return kv.replace(aux=kv.aux.aux)


def _counting(kv: KV, own: KV) -> KV:
    return own.replace(aux=kv.aux.replace(aux=own.aux))


def _n_read(kv: KV, chosen: Selection | None) -> Int[Array, " B"]:
    """Counts the occupied slots that are chosen, of all KV heads."""
    if chosen is None:
        return cache.count(kv).sum(-1)
    rows = attend.listed(kv, chosen).reshape(len(kv.mass), -1)
    return (cache.take(kv.mass, rows) > 0).sum(-1, dtype=jnp.int32)


def reads(state: State, method: Counted, model: Model) -> dict[str, Any]:
    """Returns what a decode step of one row read, the mean over steps and rows.

    Layers with a window, which are the same with every method, are left out.

    Returns: `tokens` per KV head, the mean over layers and in each; `bytes_read`: these tokens' keys, values,
    positions and masses, and the method's index of the occupied slots; and `bytes_shared`: codebooks, which
    a step reads once for all its rows, as it does the parameters.
    """
    tokens, total, shared = [], 0.0, 0
    for kv, m in zip(state, per_layer(method, model.config), strict=True):
        if not isinstance(m, Counted):
            continue
        rows = sum(kv.slots)
        one, two = (measure.nbytes(_index(m.method, kv, batch)) for batch in (1, 2))
        read, held = (float(jnp.mean(x / kv.aux.steps)) for x in (kv.aux.read, kv.aux.held))
        slot_bytes = measure.nbytes((kv.rows, kv.pos, kv.mass)) / (len(kv.mass) * rows)
        tokens.append(read / len(kv.slots))
        total += read * slot_bytes + held / rows * (two - one)
        shared += 2 * one - two
    mean = sum(tokens) / len(tokens)
    return {"tokens": mean, "tokens_layers": tokens, "bytes_read": total, "bytes_shared": shared}


def _index(method: CacheMethod, kv: KV, batch: int) -> Any:
    """Returns the shapes of a method's index."""
    dtype = storage.dtype(kv.k)
    return jax.eval_shape(lambda: method.init(kv.layer, batch, kv.slots, dtype)).aux


def budget_of(name: str, wanted: float, model: Model, seen: int) -> int:
    """Returns the budget with which a method's steps read the wanted bytes: the nearest, in whole pages.

    Args:
        name: a method, as `spec.parse` takes it.
        wanted: bytes, see `reads`.
        seen: tokens of which a step reads, on average.

    Raises:
        ValueError: for a method that reads the same with every budget.
    """
    page = getattr(spec.parse(name, budget=1), "page", 1)
    low, high = (seen // page // n * page for n in (4, 2))
    fewer, more = (_planned(spec.parse(name, budget=n), model, seen) for n in (low, high))
    if more == fewer:
        raise ValueError(
            f"a method reads more with a larger budget, got {name!r}, whose steps read {more} bytes with "
            "any: leave it out"
        )
    budget = low + (wanted - fewer) * (high - low) / (more - fewer)
    budget += (page - 1) / 2  # what the newest page lacks, on average
    return min(model.config.context_length, page * max(1, round(budget / page)))


def _planned(method: CacheMethod, model: Model, seen: int) -> int:
    """Returns the bytes that a step reads of `seen` tokens in layers without a window, from shapes."""
    state = jax.eval_shape(lambda: states.init_state(model, method, 1, seen))
    methods = per_layer(method, model.config)
    pairs = [(kv, m) for kv, m in zip(state, methods, strict=True) if kv.layer.window is None]
    return measure.bytes_read(*zip(*pairs, strict=True))
