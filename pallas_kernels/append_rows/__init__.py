"""Writes new tokens to the next free slots of a cache, in all of its arrays at once, and counts them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import dispatch
from pallas_kernels.append_rows import gpu, reference

__all__ = ["append_rows"]


def append_rows(
    stores: Any,
    rows: Any,
    fill: Int[Array, "B K"],
    seen: Int[Array, " B"],
    order: Int[Array, "B T"],
    *,
    slots: tuple[int, ...],
    impl: str | None = None,
) -> tuple[Any, Int[Array, "B K"], Int[Array, " B"]]:
    """Returns the stores with row t of every head at its slot fill + order[t], and fill and seen after that.

    Donate what is given, and it is written in place. What lies beyond a head's capacity is dropped.

    Args:
        stores: arrays [B R] or [B R D] of any types, a pytree, in which the heads lie one after the other.
            R = Σ slots.
        rows: what is written, [B K T] or [B K T D], of the same types and structure.
        fill: the first free slot of each head.
        seen: how many tokens each batch row has taken, those that were dropped too.
        order: which of the new slots each token takes; -1 for none. A token has a slot of its own.
        slots: capacity of each KV head.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs: XLA scatters.

    Raises:
        ValueError: for shapes or types that disagree.

    Cost: writes B·K·T rows of each store, in one launch, which also counts where T <= 16.

    Example:
        >>> rows, order = jnp.asarray([[[7, 8]]]), jnp.asarray([[1, 0]])
        >>> fill, seen = jnp.asarray([[1]]), jnp.asarray([1])
        >>> store, fill, seen = append_rows(jnp.zeros((1, 4), int), rows, fill, seen, order, slots=(4,))
        >>> store.tolist(), fill.tolist(), seen.tolist()
        ([[0, 8, 7, 0]], [[3]], [3])
    """
    batch, length = order.shape
    for store, new in zip(jax.tree.leaves(stores), jax.tree.leaves(rows), strict=True):
        wanted = (batch, len(slots), length, *store.shape[2:])
        if store.shape[:2] != (batch, sum(slots)) or new.shape != wanted or new.dtype != store.dtype:
            raise ValueError(
                f"a store has a row per slot and new rows are of its type, got {store.shape} {store.dtype} "
                f"and {new.shape} {new.dtype} for {slots=} and {order.shape=}"
            )
    if fill.shape != (batch, len(slots)) or seen.shape != (batch,):
        raise ValueError(
            f"each head has a first free slot, and each row a count, got {fill.shape=} and {seen.shape=} for "
            f"{batch=} and {slots=}"
        )
    impls = {"reference": reference.run, "gpu": gpu.run}
    fill, seen, order = (x.astype(jnp.int32) for x in (fill, seen, order))
    return dispatch.run("append_rows", impl, impls, stores, rows, fill, seen, order, slots=slots)
