"""Evicts slots to a budget: by score, or as a ring. Methods that score tokens share this.

A full head makes room one slot at a time: the victim's mass becomes 0 and `fill` points at it, so
a decode step moves no other slot. A state larger than the budget (after a prompt) is compacted.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import cache
from kvjax.cache import KV
from kvjax.shapes import Packed

__all__ = ["by_score", "protect_recent", "ring", "wrap"]


def by_score(kv: KV, score: Packed, budget: Sequence[int]) -> tuple[KV, Int[Array, "B Q"] | None]:
    """Evicts the lowest scores until every head has a free slot within its budget.

    Returns: the state, and the old packed rows if slots moved (see `cache.keep`), else None.
    """
    slots = tuple(min(b, s) for b, s in zip(budget, kv.slots, strict=True))
    if slots != kv.slots:
        return cache.keep(kv, score, [s - 1 for s in slots], slots)
    return _free_one(kv, score), None


def _free_one(kv: KV, score: Packed) -> KV:
    """Frees the lowest-scored slot of every head that is full."""
    victims, fills = [], []
    for run in cache.runs(kv.slots):
        alive = cache.view(kv.mass, run) > 0
        lowest = jnp.argmin(jnp.where(alive, cache.view(score, run), jnp.inf), axis=-1)  # [B n]
        full = jnp.all(alive, axis=-1)
        first = run.row + jnp.arange(run.n) * run.size
        victims.append(jnp.where(full, lowest + first, kv.mass.shape[1]))
        fills.append(jnp.where(full, lowest, kv.fill[:, run.head : run.head + run.n]))
    rows = jnp.concatenate(victims, axis=1)
    mass = kv.mass.at[jnp.arange(rows.shape[0])[:, None], rows].set(0.0, mode="drop")
    return kv.replace(mass=mass, fill=jnp.concatenate(fills, axis=1).astype(jnp.int32))


def protect_recent(kv: KV, score: Packed, n_recent: Sequence[int]) -> Packed:
    """Puts the newest n_recent[head] tokens of every head above all other scores."""
    span = jnp.concatenate([jnp.full((s,), n) for s, n in zip(kv.slots, n_recent, strict=True)])
    return jnp.where(kv.pos >= kv.seen[:, None] - span, jnp.inf, score)


def ring(kv: KV, budget: Sequence[int], n_sinks: int) -> KV:
    """Keeps the first n_sinks and the newest slots, and points `fill` at the oldest of the rest."""
    slots = tuple(min(b, s) for b, s in zip(budget, kv.slots, strict=True))
    if slots == kv.slots:
        return kv
    place = [jnp.arange(s, dtype=jnp.int32) for s in kv.slots]
    sink = jnp.concatenate([p < n_sinks for p in place])[None, :]
    score = jnp.where(sink, jnp.inf, kv.pos.astype(jnp.float32))
    kv, _ = cache.keep(kv, score, slots, slots)
    return wrap(kv, n_sinks)


def wrap(kv: KV, n_sinks: int) -> KV:
    """Turns `fill` back to the slot after the sinks where it ran past the end."""
    size = jnp.asarray(kv.slots, jnp.int32)[None, :]
    return kv.replace(fill=jnp.where(kv.fill >= size, jnp.minimum(n_sinks, size - 1), kv.fill))
