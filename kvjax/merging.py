"""Merges slots of a KV state into others, given which: weighted means, no gaps, and nothing else is touched.

    n' = n_b + Σ n_a      k' = (n_b k_b + Σ n_a k_a) / n'      v' and the position alike

The sums are `merge_rows`; here is which slots they are of, and where their means stand.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import cache, storage
from kvjax.cache import KV
from kvjax.models.config import RopeConfig
from kvjax.rope import frequencies
from kvjax.shapes import Packed
from pallas_kernels import MergeForm, merge_rows

__all__ = ["close", "dense", "merge", "packed", "take"]


def merge(
    kv: KV, n: Packed, into: Int[Array, "B R"], slots: Sequence[int], *, rope: RopeConfig | None,
    n_first: int, most: int, reach: int | None,
) -> tuple[KV, Float[Array, "B Q"]]:  # fmt: skip
    """Merges slots into others and packs the state into `slots`, in the old order.

    Where more slots are left than a head has room for, its oldest are dropped, but not the first `n_first`.

    Args:
        n: tokens that each slot stands for.
        into: the packed row that each goes into; R for those that stay.
        rope: keys are averaged before this rotation, and rotated to their mean position; None: as they are.
        most, reach: how many merge at most, and over how many rows, see `merge_rows`.

    Returns: the state and n.
    """
    old, _ = close((kv.mass > 0) & (into >= kv.mass.shape[1]), kv.slots, slots, n_first)
    rows, turn, factor = (storage.read(kv.k), storage.read(kv.v)), None, 1.0
    if rope is not None:
        turn, factor = frequencies(rope, rows[0].shape[2])
        turn = jnp.asarray(turn, jnp.float32)
    form = MergeForm(kv.slots, most, reach, factor)
    (keys, values), made, pos = merge_rows(rows, n, old, into, kv.pos, turn, form=form)
    mass = jnp.where(made > cache.take(n, old), made, cache.take(kv.mass, old))
    when = pos.astype(jnp.float32)
    kv = kv.replace(
        k=storage.renew(kv.k, keys, mass, when, slots), v=storage.renew(kv.v, values, mass, when, slots),
        pos=pos, mass=mass, slots=tuple(slots),
    )  # fmt: skip
    return kv.replace(fill=cache.count(kv)), made


def close(
    stays: Bool[Array, "B R"], slots: Sequence[int], goal: Sequence[int], n_first: int = 0
) -> tuple[Int[Array, "B Q"], Int[Array, "B R"]]:
    """Closes the gaps between the rows that stay, in a state whose capacity becomes `goal`.

    Returns for each new row the old one (-1 = empty), and for each old row the new one (Q = none).
    """
    batch, n_new = jnp.arange(stays.shape[0])[:, None], sum(goal)
    here = dense(stays, slots, False)  # [B K S]
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
