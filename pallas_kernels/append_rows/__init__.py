"""Writes new tokens to the next free slots of a cache, in all of its arrays at once, and counts them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from pallas_kernels import dispatch
from pallas_kernels.append_rows import gpu, reference

__all__ = ["Turn", "append_rows"]


@struct.dataclass
class Turn:
    """How new tokens are rotated by their positions: channel i turns with channel i + D/2.

    stores: which leaves of the stores take rotated rows.
    """

    cos: Any  # [B T D/2] float32, with any factor on it
    sin: Any  # as cos
    vectors: Any  # a pytree of [B T K G D], rotated and returned
    stores: tuple[bool, ...] = struct.field(pytree_node=False)


def append_rows(
    stores: Any,
    rows: Any,
    fill: Int[Array, "B K"],
    seen: Int[Array, " B"],
    order: Int[Array, "B T"],
    turn: Turn | None = None,
    *,
    slots: tuple[int, ...],
    impl: str | None = None,
) -> tuple[Any, Int[Array, "B K"], Int[Array, " B"], Any]:
    """Returns the stores with row t of every head at its slot fill + order[t], and fill and seen after that.

    Donate what is given, and it is written in place. What lies beyond a head's capacity is dropped. Last
    come the vectors of `turn`, rotated; None without.

    Args:
        stores: arrays [B R] or [B R D], a pytree, in which the heads lie one after the other.
            R = Σ slots.
        rows: what is written, [B K T] or [B K T D], of the same types and structure.
        fill: the first free slot of each head.
        seen: how many tokens each batch row has taken, those that were dropped too.
        order: which of the new slots each token takes; -1 for none. A token has a slot of its own.
        turn: rotates rows on their way, and vectors that are not stored, such as queries.
        slots: capacity of each KV head.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs: XLA scatters.

    Raises:
        ValueError: for shapes or types that disagree.
        NotImplementedError: for rows of several types, where impl names a kernel.

    Cost: writes B·K·T rows of each store, in one launch, which also counts where T <= 16.

    Example:
        >>> rows, order = jnp.asarray([[[7, 8]]]), jnp.asarray([[1, 0]])
        >>> fill, seen = jnp.asarray([[1]]), jnp.asarray([1])
        >>> store, fill, seen, _ = append_rows(jnp.zeros((1, 4), int), rows, fill, seen, order, slots=(4,))
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
    if turn is not None:
        _check_turn(turn, jax.tree.leaves(stores), (batch, length, len(slots)))
    impls = {"reference": reference.run, "gpu": gpu.run}
    fill, seen, order = (x.astype(jnp.int32) for x in (fill, seen, order))
    return dispatch.run("append_rows", impl, impls, stores, rows, fill, seen, order, turn, slots=slots)


def _check_turn(turn: Turn, stores: list[Any], sizes: tuple[int, int, int]) -> None:
    """Raises ValueError for rotations that do not fit what they turn."""
    turned = [x for x, of in zip(stores, turn.stores, strict=True) if of]
    vectors = jax.tree.leaves(turn.vectors)
    fit = all(x.ndim == 5 and x.shape[:3] == sizes for x in vectors) and all(x.ndim == 3 for x in turned)
    widths = {2 * turn.cos.shape[-1], *(x.shape[-1] for x in (*turned, *vectors))}
    if not fit or len(widths) > 1 or not turn.cos.shape[:-1] == turn.sin.shape[:-1] == sizes[:2]:
        raise ValueError(
            "a token has a cosine and a sine for each two channels, vectors are [B T K G D], turned stores "
            f"[B R D]: got {turn.cos.shape=}, {turn.sin.shape=}, {[x.shape for x in (*vectors, *turned)]} "
            f"for [B T K] = {sizes}"
        )
