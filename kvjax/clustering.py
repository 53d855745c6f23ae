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
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import cache, storage
from kvjax.cache import KV
from kvjax.models.config import RopeConfig
from kvjax.rope import rotate, unrotate
from kvjax.shapes import Packed
from pallas_kernels import chunked_similarity

__all__ = ["Matching", "matches", "merge", "plan", "reduce"]

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
    """Returns how many slots of `size` each pass leaves, at most; the last reaches the goal if one can.

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
        room = (
            slots if i == n_passes else [max(s, *p[i - 1 : i], s) for p, s in zip(plans, slots, strict=True)]
        )
        kv, n = merge(kv, n, target, goal, room, how)
    return kv, n


def merge(
    kv: KV, n: Packed, target: Int[Array, "B K"], goal: Sequence[int], slots: Sequence[int], how: Matching
) -> tuple[KV, Float[Array, "B Q"]]:
    """Runs one pass: merges the most similar slots until target[b, head] are left, and closes the gaps.

    Slots that hold NaN or inf stay as they are. Where no more can merge, the oldest slots after the sinks
    are dropped for want of room.

    goal: slots of each head that no target goes below; the pass makes room for the merges this allows.

    Cost: reads and writes K and V once, and K once more for the similarities. Sums are made for the slots
    that merge alone, in float32.
    """
    best, similarity = matches(kv, n, how)
    source, into = _chosen(kv, best, similarity, cache.count(kv) - target, goal, how)  # [B M], R = none
    old, new = _packed(kv, source, slots, how.n_sinks)  # [B Q], [B R]
    group = _Group.of(kv, n, source, into)
    at = jnp.where(group.leads, _at(new, into), old.shape[1])
    batch = jnp.arange(at.shape[0])[:, None]

    keys, values, rope = storage.read(kv.k), storage.read(kv.v), kv.layer.rope if how.before_rope else None

    def put(x: Array, y: Array) -> Array:
        return cache.take(x, old).at[batch, at].set(y.astype(x.dtype), mode="drop")

    pos = jnp.round(group.mean(kv.pos[..., None])[..., 0]).astype(jnp.int32)
    keys, values = put(keys, group.mean(keys, rope, pos)), put(values, group.mean(values))
    pos, n, mass = put(kv.pos, pos), put(n, group.n), put(kv.mass, group.n)
    when = pos.astype(jnp.float32)
    kv = kv.replace(
        k=storage.renew(kv.k, keys, mass, when, slots), v=storage.renew(kv.v, values, mass, when, slots),
        pos=pos, mass=mass, slots=tuple(slots),
    )  # fmt: skip
    return kv.replace(fill=cache.count(kv)), n


def matches(kv: KV, n: Packed, how: Matching) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
    """Returns of each slot that may merge the destination and the similarity, -1 and -inf of others."""
    keys, values = storage.read(kv.k), storage.read(kv.v)
    free = (kv.mass > 0) & (kv.pos >= how.n_sinks) & (kv.pos < kv.seen[:, None] - how.n_recent)
    free = free & jnp.isfinite(keys).all(-1) & jnp.isfinite(values).all(-1)
    plain = unrotate(keys, kv.pos, kv.layer.rope) if how.before_rope else keys
    options = {"slots": kv.slots, "chunk": how.chunk, "stride": how.stride, "kind": how.similarity}
    return chunked_similarity(plain, jnp.where(free, n, 0.0), **options)


class _Group(NamedTuple):
    """The sources of a pass, and their destinations. The first source of a destination leads."""

    source: Array  # [B M] packed row, R = none
    into: Array  # [B M] packed row of the destination, R = none
    old_pos: Array  # [B R]
    leader: Array  # [B M] the source that leads, as an index of M
    leads: Array  # [B M] bool
    n_source: Array  # [B M] tokens
    n_into: Array  # [B M] tokens, before the merge
    n: Array  # [B M] tokens of the destination after it, where the source leads

    @classmethod
    def of(cls, kv: KV, n: Packed, source: Array, into: Array) -> "_Group":
        """Finds who leads, and counts."""
        (batch, rows), m = kv.mass.shape, source.shape[1]
        row, nth = jnp.arange(batch)[:, None], jnp.arange(m)
        first = jnp.full((batch, rows), m, jnp.int32).at[row, into].min(nth, mode="drop")
        leader = jnp.where(into < rows, _at(first, into), m)
        n_source, n_into = jnp.where(source < rows, _at(n, source), 0.0), _at(n, into)
        total = n_into + jnp.zeros((batch, m)).at[row, leader].add(n_source, mode="drop")
        return cls(source, into, kv.pos, leader, leader == nth, n_source, n_into, total)

    def mean(self, x: Array, rope: RopeConfig | None = None, pos: Array | None = None) -> Array:
        """Returns the weighted mean of each led group, [B M D] float32; keys in the frame before rope."""

        def weighted(row: Array, weight: Array) -> Array:
            y = _at(x, row).astype(jnp.float32)
            y = unrotate(y, _at(self.old_pos, row), rope) if rope else y
            return jnp.where(weight[..., None] > 0, weight[..., None] * y, 0.0)

        batch = jnp.arange(x.shape[0])[:, None]
        sums = weighted(self.into, self.n_into)
        sums = sums.at[batch, self.leader].add(weighted(self.source, self.n_source), mode="drop")
        means = sums / jnp.maximum(self.n, 1.0)[..., None]
        return rotate(means, pos, rope) if rope else means


def _at(x: Array, row: Int[Array, "B M"]) -> Array:
    """Returns rows of x, the last for those out of range."""
    at = jnp.minimum(row, x.shape[1] - 1)
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


def _chosen(
    kv: KV, best: Array, similarity: Array, n_merges: Int[Array, "B K"], goal: Sequence[int], how: Matching
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
    """Returns the packed rows that merge, n_merges most similar of each head, and into which; R = none."""
    rows, sources, into = kv.mass.shape[1], [], []
    for run in cache.runs(kv.slots, goal):
        value, at = cache.view(similarity, run), cache.view(best, run)
        whole, rest = divmod(run.size, how.chunk)
        n_sources = run.size - whole * (how.chunk // how.stride) - rest // how.stride
        most = min(n_sources, max(run.size - goal[run.head], 0))
        source = jnp.argsort(-value, axis=-1, stable=True)[..., :most]
        at = jnp.take_along_axis(at, source, -1)
        go = (jnp.arange(most) < n_merges[:, run.head : run.head + run.n, None]) & (at >= 0)
        first = (run.row + jnp.arange(run.n) * run.size)[:, None]
        for found, x in ((sources, source), (into, at)):
            found.append(jnp.where(go, x + first, rows).reshape(x.shape[0], -1))
    return jnp.concatenate(sources, axis=1), jnp.concatenate(into, axis=1)


def _packed(
    kv: KV, leave: Int[Array, "B M"], slots: Sequence[int], n_sinks: int
) -> tuple[Int[Array, "B Q"], Int[Array, "B R"]]:
    """Closes the gaps that the rows `leave` make in a state of capacity `slots`, in the old order.

    Returns for each new row the old one (-1 = empty), and for each old row the new one (Q = none).
    """
    batch, rows, n_new = jnp.arange(leave.shape[0])[:, None], kv.mass.shape[1], sum(slots)
    stays = (kv.mass > 0).at[batch, leave].set(False, mode="drop")
    new, first = [], 0
    for run in cache.runs(kv.slots, slots):
        size, here = slots[run.head], cache.view(stays, run)
        nth = jnp.cumsum(here, axis=-1)
        over = jnp.maximum(nth[..., -1:] - size, 0)  # more than none, where slots could not merge
        row = first + jnp.arange(run.n)[:, None] * size + jnp.where(nth <= n_sinks, nth, nth - over) - 1
        here = here & ((nth <= n_sinks) | (nth > n_sinks + over))
        new.append(jnp.where(here, row, n_new).reshape(row.shape[0], -1))
        first += run.n * size
    to = jnp.concatenate(new, axis=1)
    old = jnp.full((to.shape[0], n_new), -1, jnp.int32)
    return old.at[batch, to].set(jnp.arange(rows, dtype=jnp.int32), mode="drop"), to
