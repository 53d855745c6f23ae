"""Writes one new row per head to stores of integer codes whose newest rows are kept exact in a ring."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import Codes, check_scales
from pallas_kernels.write_codes import gpu, reference

__all__ = ["Ring", "write_codes"]


@struct.dataclass
class Ring:
    """The newest rows of each head as they were, which stand for their codes."""

    rows: Any  # [B K W D]
    slot: Any  # [B K W] int32 packed row of each, R = none
    turn: Any  # [B K] int32, where the next one goes


def write_codes(
    stores: Sequence[Codes],
    rings: Sequence[Ring],
    rows: Sequence[Array],
    idx: Int[Array, "B K"],
    mass: Float[Array, "B R"],
    *,
    slots: tuple[int, ...],
    impl: str | None = None,
) -> tuple[tuple[Codes, ...], tuple[Ring, ...]]:
    """Returns the stores and rings with a new row per head: it enters its ring, and its codes are written.

    Where scales are one per row, those of the new row; where they are of blocks, those of its whole block,
    made anew from exact rows as far as the ring still has them, and from their codes otherwise. Donate what
    is given, and it is written in place.

    Args:
        stores: such as of keys and of values.
        rings: of each store, whose rows its codes are of.
        rows: [B K D] for each store, of its ring's type, as its scales are.
        idx: packed row that each head's goes to; R = none.
        mass: of all slots, after the write; blocks are scaled by those with mass.
        slots: capacity of each KV head. R = Σ slots.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs.

    Raises:
        ValueError: for shapes or types that disagree.

    Cost: reads and writes a block, or a row, of each head and store, in one launch.

    Example:
        >>> from pallas_kernels.attention import quantize
        >>> store = quantize(jnp.asarray([[[0.0, 3.0], [0.0, 0.0]]]), 8, (2,), None)
        >>> ring = Ring(jnp.zeros((1, 1, 1, 2)), jnp.full((1, 1, 1), 2), jnp.zeros((1, 1), int))
        >>> new, idx, mass = jnp.asarray([[[1.0, 2.0]]]), jnp.asarray([[1]]), jnp.ones((1, 2))
        >>> (store,), (ring,) = write_codes([store], [ring], [new], idx, mass, slots=(2,))
        >>> store.codes[0].tolist(), ring.rows[0, 0].tolist(), ring.slot[0, 0].tolist()
        ([[0, 255], [0, 255]], [[1.0, 2.0]], [1])
    """
    batch, n_heads = idx.shape
    if len(slots) != n_heads or mass.shape != (batch, sum(slots)):
        raise ValueError(
            f"each head writes a slot and each slot has a mass, got {idx.shape=}, {mass.shape=} for {slots=}"
        )
    for store, ring, row in zip(stores, rings, rows, strict=True):
        window, size = ring.rows.shape[2:]
        shapes = (ring.rows.shape, ring.slot.shape, ring.turn.shape, row.shape, store.codes.shape)
        wanted = (
            (batch, n_heads, window, size), (batch, n_heads, window), (batch, n_heads),
            (batch, n_heads, size), (batch, sum(slots), size * store.bits // 8),
        )  # fmt: skip
        types = {x.dtype for x in (row, ring.rows, store.scale, store.zero)}
        if shapes != wanted or len(types) > 1:
            raise ValueError(
                f"a ring, a new row and the codes of each head are {wanted}, with scales of their type, got "
                f"{shapes} of {sorted(map(str, types))}"
            )
        check_scales("a store", store, tuple(slots), size)
    impls = {"reference": reference.run, "gpu": gpu.run}
    rings = [Ring(x.rows, *(y.astype(jnp.int32) for y in (x.slot, x.turn))) for x in rings]
    args = (tuple(stores), tuple(rings), tuple(rows), idx.astype(jnp.int32), mass)
    return dispatch.run("write_codes", impl, impls, *args, slots=tuple(slots))
