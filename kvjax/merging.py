"""Merges slots of a KV state into others, given which: weighted means, no gaps, and nothing else is touched.

    n' = n_b + Σ n_a      k' = (n_b k_b + Σ n_a k_a) / n'      v' and the position alike

Sums are made for the slots that merge alone, in float32, so that a step that merges few needs little memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import cache, storage
from kvjax.cache import KV
from kvjax.models.config import RopeConfig
from kvjax.rope import rotate, unrotate
from kvjax.shapes import Packed

__all__ = ["Groups", "close", "dense", "merge", "packed", "put", "take"]


def merge(
    kv: KV, n: Packed, groups: "Groups", slots: Sequence[int], *, rope: RopeConfig | None, n_first: int
) -> tuple[KV, Float[Array, "B Q"]]:
    """Merges groups of slots and packs the state into `slots`, in the old order.

    Where more slots are left than a head has room for, its oldest are dropped, but not the first `n_first`.

    Args:
        n: tokens that each slot stands for.
        rope: keys are averaged before this rotation, and rotated to their mean position; None: as they are.

    Returns: the state and n.
    """
    old, new = close(kv.mass > 0, groups.source, kv.slots, slots, n_first)
    at = groups.led(new, n_rows=old.shape[1])
    pos = jnp.round(groups.mean(kv.pos[..., None].astype(jnp.float32))[..., 0]).astype(jnp.int32)
    keys, values = storage.read(kv.k), storage.read(kv.v)
    mean = groups.mean(keys, rope and (rope, kv.pos))
    keys = put(cache.take(keys, old), at, rotate(mean, pos, rope) if rope else mean)
    values = put(cache.take(values, old), at, groups.mean(values))
    pos, n, mass = (
        put(cache.take(x, old), at, y) for x, y in ((kv.pos, pos), (n, groups.n), (kv.mass, groups.n))
    )
    when = pos.astype(jnp.float32)
    kv = kv.replace(
        k=storage.renew(kv.k, keys, mass, when, slots), v=storage.renew(kv.v, values, mass, when, slots),
        pos=pos, mass=mass, slots=tuple(slots),
    )  # fmt: skip
    return kv.replace(fill=cache.count(kv)), n


class Groups(NamedTuple):
    """Which rows merge into which; several sources may have one destination, and the first of them leads."""

    source: Array  # [B M] packed row, R = none
    into: Array  # [B M] packed row of the destination, R = none
    leader: Array  # [B M] the source that leads, as an index of M
    n_source: Array  # [B M] tokens
    n_into: Array  # [B M] tokens, before the merge
    n: Array  # [B M] tokens after it, where the source leads

    @classmethod
    def of(cls, n: Packed, source: Int[Array, "B M"], into: Int[Array, "B M"]) -> "Groups":
        """Finds who leads, and counts."""
        (batch, rows), m = n.shape, source.shape[1]
        row = jnp.arange(batch)[:, None]
        first = jnp.full((batch, rows), m, jnp.int32).at[row, into].min(jnp.arange(m), mode="drop")
        leader = jnp.where(into < rows, take(first, into), m)
        n_source, n_into = jnp.where(source < rows, take(n, source), 0.0), take(n, into)
        total = n_into + jnp.zeros((batch, m)).at[row, leader].add(n_source, mode="drop")
        return cls(source, into, leader, n_source, n_into, total)

    def mean(
        self, x: Float[Array, "B R D"], rope: tuple[RopeConfig, Array] | None = None
    ) -> Float[Array, "B M D"]:
        """Returns the weighted mean of each group, where its leader stands, in float32.

        rope: rotation and positions of the rows, to be undone.
        """

        def weighted(row: Array, weight: Array) -> Array:
            y = take(x, row).astype(jnp.float32)
            y = unrotate(y, take(rope[1], row), rope[0]) if rope else y
            return jnp.where(weight[..., None] > 0, weight[..., None] * y, 0.0)

        batch = jnp.arange(x.shape[0])[:, None]
        sums = weighted(self.into, self.n_into)
        sums = sums.at[batch, self.leader].add(weighted(self.source, self.n_source), mode="drop")
        return sums / jnp.maximum(self.n, 1.0)[..., None]

    def led(self, new: Int[Array, "B R"], n_rows: int) -> Int[Array, "B M"]:
        """Returns the new row of the destination of each leader, and n_rows for sources that do not lead."""
        return jnp.where(self.leader == jnp.arange(self.leader.shape[1]), take(new, self.into), n_rows)


def close(
    alive: Bool[Array, "B R"],
    leave: Int[Array, "B M"],
    slots: Sequence[int],
    goal: Sequence[int],
    n_first: int = 0,
) -> tuple[Int[Array, "B Q"], Int[Array, "B R"]]:
    """Closes the gaps that the rows `leave` make, in a state whose capacity becomes `goal`.

    Returns for each new row the old one (-1 = empty), and for each old row the new one (Q = none).
    """
    batch, n_new = jnp.arange(alive.shape[0])[:, None], sum(goal)
    here = dense(alive.at[batch, leave].set(False, mode="drop"), slots, False)  # [B K S]
    nth = jnp.cumsum(here, axis=-1)
    size, first = (np.asarray(x)[:, None] for x in (goal, cache.starts(goal)))
    over = jnp.maximum(nth[..., -1:] - size, 0)  # more than none, where slots could not merge
    row = first + jnp.where(nth <= n_first, nth, nth - over) - 1
    here = here & ((nth <= n_first) | (nth > n_first + over))
    new = packed(jnp.where(here, row, n_new), slots)
    old = jnp.full((new.shape[0], n_new), -1, jnp.int32)
    return old.at[batch, new].set(jnp.arange(new.shape[1], dtype=jnp.int32), mode="drop"), new


def dense(x: Array, slots: Sequence[int], fill_value: Any) -> Array:
    """Returns packed numbers as [B K S] for the largest S, with fill_value where a head has fewer slots."""
    slot, sizes = np.arange(max(slots)), np.asarray(slots)[:, None]
    rows = cache.starts(slots)[:, None] + np.minimum(slot, np.maximum(sizes - 1, 0))
    return jnp.where(slot < sizes, x[:, np.minimum(rows, x.shape[1] - 1)], fill_value)


def packed(x: Array, slots: Sequence[int]) -> Array:
    """Returns the first slots[head] entries of each head of [B K S], head after head."""
    head = np.repeat(np.arange(len(slots)), slots)
    return x[:, head, np.arange(len(head)) - cache.starts(slots)[head]]


def take(x: Array, row: Int[Array, "B M"]) -> Array:
    """Returns rows of x; the last for those out of range."""
    at = jnp.minimum(row, x.shape[1] - 1)
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


def put(x: Array, row: Int[Array, "B M"], y: Array) -> Array:
    """Writes rows of x; none for those out of range."""
    return x.at[jnp.arange(x.shape[0])[:, None], row].set(y.astype(x.dtype), mode="drop")
