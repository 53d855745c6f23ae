"""Finds which slots of a KV state to merge: chunked soft matching of similar neighbours.

    in each chunk: every source has a most similar destination          (`chunked_similarity`)
    of a head's sources, the most similar ones join theirs; several may join the same one
    a cluster's key is the mean of its tokens' keys; the next pass matches clusters

Keys are compared and averaged before they are rotated, unless asked otherwise: two keys of one content
at two positions point elsewhere once rotated. A merged key is rotated to its cluster's mean position.

Source: Chelsea (arXiv 2506.11418). Deviations: similarities rank over a whole head and not in each chunk;
the frame before rotation, sinks, and several passes of equal ratio are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kvjax import cache, merging, storage
from kvjax.cache import KV
from kvjax.rope import rotate_rows
from kvjax.shapes import Leaf, Packed
from pallas_kernels import MergeForm, chunked_similarity, mark_topk, merge_rows
from pallas_kernels.backend import debug_check

__all__ = ["Clusters", "Matching", "begin", "finish", "matches", "merge", "plan", "reduce"]

_MOST = 32  # passes
_LONG = 4096  # slots of a head from which on a pass that looks at less is worth what it takes to compile


@dataclass(frozen=True)
class Matching:
    """How slots are matched; see `Chelsea`, which has the same settings."""

    chunk: int
    stride: int
    similarity: str
    before_rope: bool
    n_sinks: int
    n_recent: int
    recent: float = 0.0

    def newest(self, goal: int) -> int:
        """Returns how many of the newest tokens of a head stay as they are, of `goal` slots."""
        return max(self.n_recent, int(self.recent * goal))


@struct.dataclass
class Clusters:
    """What passes work on: clusters in order of time, without gaps. Each will stand in one token's row."""

    keys: Leaf  # [B R D] mean key, in the frame that is compared
    n: Leaf  # [B R] tokens, 0 for a cluster that must stay as it is
    root: Leaf  # [B R] int32, row of the state that the cluster will stand in, -1 = none
    at: Leaf  # [B R] int32, for each row of the state the cluster that it is in, R or more = none


def plan(size: int, goal: int, how: Matching, rounds: int | None = None) -> list[int]:
    """Returns how many slots of `size` each pass leaves, at most; the last reaches the goal if one can.

    rounds: so many passes of equal ratio; None: each keeps 1/√stride, half of what it could merge, until the
    goal is reached. A pass merges at most its sources, and what must stay takes no part.
    """
    left, ratio = [size], _ratio(size, goal, how, rounds)
    while left[-1] > goal and len(left) <= (rounds or _MOST):
        free = max(left[-1] - how.n_sinks - how.newest(goal), 0)
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

    Cost: reads the keys twice and writes them once to compare them, and as much again for what each pass but
    the last leaves; then reads and writes keys and values once.
    """
    plans = [plan(size, g, how, rounds) or [size] for size, g in zip(kv.slots, goal, strict=True)]
    first, goals, last = cache.count(kv), jnp.asarray(goal, jnp.int32), max(map(len, plans)) - 1
    ratio = _ratio(jnp.maximum(first, goals), goals, how, rounds)

    def one(i: Array, clusters: Clusters, held: tuple[int, ...], left: tuple[int, ...]) -> Clusters:
        target = jnp.maximum(goals, jnp.ceil(first * ratio ** (i + 1) - 1e-3).astype(jnp.int32))
        target = jnp.where(full, jnp.where(i + 1 >= (rounds or last + 1), goals, target), first)
        return merge(clusters, target, held, goal, how, left)

    clusters = begin(kv, n, how, jnp.asarray([how.newest(g) for g in goal], jnp.int32))
    held = kv.slots
    if len(set(zip(kv.slots, goal, strict=True))) == 1 and kv.slots[0] >= _LONG:
        for i in range(last):  # each pass has less to look at
            left = tuple(max(plans[0][i], size) for size in slots)  # where a head is not full it has `slots`
            clusters, held = one(jnp.int32(i), clusters, held, left), left
    elif last:  # where heads differ, each layer has a program of its own, which had better be compiled soon
        clusters = jax.lax.fori_loop(0, last, lambda i, clusters: one(i, clusters, held, held), clusters)
    # The last pass is outside the loop, so that XLA sees that nobody wants the keys that it would move.
    clusters = one(jnp.int32(last), clusters, held, held)
    return finish(kv, n, clusters, goal, slots, how, None if last else how.chunk)


def begin(kv: KV, n: Packed, how: Matching, newest: Int[Array, " K"] | None = None) -> Clusters:
    """Makes a cluster of every slot. Sinks, recent tokens, and what is not finite must stay.

    newest: recent tokens of each head; None: n_recent in all.

    Raises:
        ValueError: in debug mode, for keys or values that are not finite.
    """
    keys, values = storage.read(kv.k), storage.read(kv.v)
    newest = jnp.full(len(kv.slots), how.n_recent) if newest is None else newest
    first = kv.seen[:, None] - newest[np.repeat(np.arange(len(kv.slots)), kv.slots)]
    free = (kv.mass > 0) & (kv.pos >= how.n_sinks) & (kv.pos < first)
    finite = jnp.isfinite(keys).all(-1) & jnp.isfinite(values).all(-1)
    debug_check(
        lambda: jnp.all(finite | (kv.mass == 0)), "keys and values are finite: a slot holds NaN or inf"
    )
    free = free & finite
    rows = jnp.broadcast_to(jnp.arange(kv.mass.shape[1], dtype=jnp.int32), kv.mass.shape)
    plain = rotate_rows(keys, kv.pos, kv.layer.rope, back=True) if how.before_rope else keys
    return Clusters(plain, jnp.where(free, n, 0.0), jnp.where(kv.mass > 0, rows, -1), rows)


def matches(
    clusters: Clusters, slots: tuple[int, ...], how: Matching
) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
    """Returns of each cluster that may merge the destination and the similarity, -1 and -inf of others."""
    options = {"chunk": how.chunk, "stride": how.stride, "kind": how.similarity}
    return chunked_similarity(clusters.keys, clusters.n, slots=slots, **options)


def merge(
    clusters: Clusters, target: Int[Array, "B K"], slots: tuple[int, ...], goal: Sequence[int], how: Matching,
    left: tuple[int, ...] | None = None,
) -> Clusters:  # fmt: skip
    """Runs one pass: merges the most similar clusters until target[b, head] are left, or no more can.

    slots: capacity of each head. goal: no target is below it; the pass makes room for the merges this allows.
    left: capacity after the pass, None for the same; where more cannot merge, the oldest are forgotten, and
    their tokens stay alone.
    """
    best, similarity = matches(clusters, slots, how)
    left = slots if left is None else left
    rows, alive = sum(slots), clusters.root >= 0
    count = merging.dense(alive, slots, False).sum(-1)
    go = mark_topk(merging.dense(similarity, slots, -jnp.inf), count - target)
    first = np.repeat(cache.starts(slots), slots)
    into = jnp.where(merging.packed(go, slots), best + first, rows)
    old, new = merging.close(alive & (into >= rows), slots, left)
    moved = jnp.where(into < rows, merging.take(new, into), new)
    form = MergeForm(slots, _most(slots, goal, how), how.chunk)
    made = merge_rows((clusters.keys,), clusters.n, old, into, form=form)
    return Clusters(
        keys=made.rows[0],
        n=made.n,
        root=cache.take(clusters.root, old, -1),
        at=jnp.where(clusters.at < rows, merging.take(moved, clusters.at), sum(left)),
    )


def finish(
    kv: KV, n: Packed, clusters: Clusters, goal: Sequence[int], slots: Sequence[int], how: Matching,
    reach: int | None = None,
) -> tuple[KV, Float[Array, "B Q"]]:  # fmt: skip
    """Merges the slots of each cluster, and packs them into `slots`. Returns the state and n.

    goal: slots of each head that are left at least. reach: slots that a cluster extends over, None for all.
    """
    rows = kv.mass.shape[1]
    held = (kv.mass > 0) & (clusters.at < clusters.root.shape[1])
    root = jnp.where(held, merging.take(clusters.root, clusters.at), -1)
    into = jnp.where((root >= 0) & (root != jnp.arange(rows)), root, rows)
    most = sum(max(size - g, 0) for size, g in zip(kv.slots, goal, strict=True))
    rope = kv.layer.rope if how.before_rope else None
    sizes = {"most": most, "reach": reach}
    return merging.merge(kv, n, into, slots, rope=rope, n_first=how.n_sinks, **sizes)


def _most(slots: Sequence[int], goal: Sequence[int], how: Matching) -> int:
    """Returns how many clusters a pass merges at most: all sources, if no head falls below its goal so."""
    sizes = np.asarray(slots)
    n_sources = sizes - sizes // how.chunk * (how.chunk // how.stride) - sizes % how.chunk // how.stride
    return int(np.minimum(n_sources, np.maximum(sizes - np.asarray(goal), 0)).sum())
