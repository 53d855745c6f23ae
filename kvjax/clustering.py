"""Merges similar neighbouring slots of a KV state: chunked soft matching.

    in each chunk: every source has a most similar destination          (`chunked_similarity`)
    of a head's sources, the most similar ones merge into theirs; several may take the same one
    n' = n_b + Σ n_a      k' = (n_b k_b + Σ n_a k_a) / n'      v' and the position alike

Keys are compared and averaged before they are rotated, unless asked otherwise: two keys of one content
at two positions point elsewhere once rotated. A merged key is rotated to the mean position.

Source: Chelsea (arXiv 2506.11418). Deviations: similarities rank over a whole head and not in each chunk;
the frame before rotation, sinks, and several passes of equal ratio are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import cache, storage
from kvjax.cache import KV
from kvjax.rope import rotate, unrotate
from kvjax.shapes import Packed
from pallas_kernels import chunked_similarity

__all__ = ["Matching", "merge", "plan", "reduce"]

_MOST = 32  # passes


@dataclass(frozen=True)
class Matching:
    """How slots are matched; see `Chelsea`, which has the same settings."""

    chunk: int
    stride: int
    similarity: str
    before_rope: bool
    n_sinks: int
    n_recent: int


def plan(size: int, goal: int, how: Matching, rounds: int | None = None) -> list[int]:
    """Returns how many slots of `size` are left after each pass, at most; the last reaches the goal if one can.

    rounds: so many passes of equal ratio; None: each keeps 1/√stride, half of what it could merge, until the
    goal is reached. A pass merges at most its sources, and what must stay takes no part.
    """
    left, ratio = [size], _ratio(size, goal, how, rounds)
    while left[-1] > goal and len(left) <= (rounds or _MOST):
        free = max(left[-1] - how.n_sinks - how.n_recent, 0)
        most = free * (how.stride - 1) // how.stride - 2 * (how.stride - 1)  # two chunks may be cut short
        wanted = goal if len(left) == rounds else max(goal, math.ceil(size * ratio ** len(left)))
        left.append(max(wanted, left[-1] - max(most, 0)))
    return left[1:]


def _ratio(size: Any, goal: Any, how: Matching, rounds: int | None) -> Any:
    return how.stride**-0.5 if rounds is None else (goal / size) ** (1 / rounds)


def reduce(
    kv: KV, n: Packed, goal: Sequence[int], full: Bool[Array, "B K"], how: Matching, rounds: int | None,
    slots: Sequence[int],
) -> tuple[KV, Float[Array, "B Q"]]:  # fmt: skip
    """Merges the heads that are `full` down to goal[head] slots, and packs all into `slots`.

    A head fares the same whatever the others' goals and however many slots are empty.

    n: tokens that each slot stands for. Returns the state and n, both packed anew.
    """
    plans = [plan(size, g, how, rounds) for size, g in zip(kv.slots, goal, strict=True)]
    first, goals = cache.count(kv), jnp.asarray(goal, jnp.int32)
    ratio = _ratio(jnp.maximum(first, goals), goals, how, rounds)
    n_passes = max(1, *map(len, plans))
    for i in range(1, n_passes + 1):
        target = jnp.maximum(goals, jnp.ceil(first * ratio**i - 1e-3).astype(jnp.int32))
        target = jnp.where(full, goals if i in (rounds, n_passes) else target, first)
        room = [max(s, *p[i - 1 : i], s) for p, s in zip(plans, slots, strict=True)]
        kv, n = merge(kv, n, target, slots if i == n_passes else room, how)
    return kv, n


def merge(
    kv: KV, n: Packed, target: Int[Array, "B K"], slots: Sequence[int], how: Matching
) -> tuple[KV, Float[Array, "B Q"]]:
    """Runs one pass: merges the most similar slots until target[b, head] are left, and closes the gaps.

    Slots that hold NaN or inf stay as they are. Where no more can merge, the oldest slots after the sinks
    are dropped for want of room.

    Cost: reads K and V about three times and writes them twice.
    """
    rows, batch = kv.mass.shape[1], jnp.arange(kv.mass.shape[0])[:, None]
    keys, values = storage.read(kv.k), storage.read(kv.v)
    plain = unrotate(keys, kv.pos, kv.layer.rope) if how.before_rope else keys
    alive = kv.mass > 0
    free = alive & (kv.pos >= how.n_sinks) & (kv.pos < kv.seen[:, None] - how.n_recent)
    free = free & jnp.isfinite(keys).all(-1) & jnp.isfinite(values).all(-1)
    best, similarity = chunked_similarity(
        plain,
        jnp.where(free, n, 0.0),
        slots=kv.slots,
        chunk=how.chunk,
        stride=how.stride,
        kind=how.similarity,
    )
    into = _chosen(kv, best, similarity, cache.count(kv) - target)  # [B R], R = stays
    merged = into < rows
    weight = jnp.where(merged, n, 0.0)
    total = n.at[batch, into].add(weight, mode="drop")
    grown = jnp.zeros(alive.shape, bool).at[batch, into].set(True, mode="drop")

    def mean(x: Array) -> Array:
        x, w = x.astype(jnp.float32), jnp.reshape(n, n.shape + (1,) * (x.ndim - 2))
        w_in = jnp.reshape(weight, w.shape)
        sums = jnp.where(w > 0, w * x, 0.0)
        sums = sums.at[batch, into].add(jnp.where(w_in > 0, w_in * x, 0.0), mode="drop")
        return sums / jnp.maximum(jnp.reshape(total, w.shape), 1.0)

    pos = jnp.where(grown, jnp.round(mean(kv.pos)).astype(jnp.int32), kv.pos)
    k = mean(plain)
    k = rotate(k, pos, kv.layer.rope) if how.before_rope else k
    keys = jnp.where(grown[..., None], k.astype(keys.dtype), keys)
    values = jnp.where(grown[..., None], mean(values).astype(values.dtype), values)
    idx = _packed(kv, alive & ~merged, slots, how.n_sinks)
    keys, values, pos, n, mass = (
        cache.take(x, idx) for x in (keys, values, pos, total, jnp.where(grown, total, kv.mass))
    )
    when = pos.astype(jnp.float32)
    kv = kv.replace(
        k=storage.renew(kv.k, keys, mass, when, slots), v=storage.renew(kv.v, values, mass, when, slots),
        pos=pos, mass=mass, slots=tuple(slots),
    )  # fmt: skip
    return kv.replace(fill=cache.count(kv)), n


def _chosen(
    kv: KV, best: Int[Array, "B R"], similarity: Float[Array, "B R"], n_merges: Array
) -> Int[Array, "B R"]:
    """Returns the packed row that each slot merges into: of each head's n_merges most similar, else R."""
    into = []
    for run in cache.runs(kv.slots):
        value, at = cache.view(similarity, run), cache.view(best, run)
        rank = jnp.argsort(jnp.argsort(-value, axis=-1, stable=True), axis=-1)
        first = (run.row + jnp.arange(run.n) * run.size)[:, None]
        go = (rank < n_merges[:, run.head : run.head + run.n, None]) & (at >= 0)
        into.append(jnp.where(go, at + first, kv.mass.shape[1]).reshape(at.shape[0], -1))
    return jnp.concatenate(into, axis=1)


def _packed(kv: KV, stays: Bool[Array, "B R"], slots: Sequence[int], n_sinks: int) -> Int[Array, "B Q"]:
    """Returns for each row of a state of capacity `slots` the old one, -1 = empty, in the old order."""
    idx = []
    for run in cache.runs(kv.slots, slots):
        size, here = slots[run.head], cache.view(stays, run)
        nth = jnp.cumsum(here, axis=-1)
        over = nth[..., -1:] - size  # zero or less, but where slots could not merge
        here = here & ((nth <= n_sinks) | (nth > n_sinks + over))
        order = jnp.argsort(~here, axis=-1, stable=True)[..., :size]
        order = jnp.where(jnp.take_along_axis(here, order, -1), order, -1)
        order = jnp.pad(order, ((0, 0), (0, 0), (0, size - order.shape[-1])), constant_values=-1)
        first = (run.row + jnp.arange(run.n) * run.size)[:, None]
        idx.append(jnp.where(order >= 0, order + first, -1).reshape(order.shape[0], -1))
    return jnp.concatenate(idx, axis=1)
