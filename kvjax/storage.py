"""Reads the vectors of a cache, dense or quantised, and writes those of a quantised one.

A dense store is an array [B R D], which `append_rows` writes. A quantised store holds integer codes
for every slot and, in full precision, a ring of the most recently written slots, which override their
codes when read (KIVI's recent window). Codes are asymmetric: value = zero + code·scale. Values are
quantised per token, keys per channel over blocks of `block` slots; a block is quantised again when
one of its slots is written, from the full-precision rows where the ring still has them, so a block
that fills up in order ends exactly as if it had been quantised at once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from kvjax.shapes import Leaf, Packed, Slots
from pallas_kernels import Codes, Ring, write_codes
from pallas_kernels.attention import block_rows, decode_codes, encode

__all__ = ["Quantized", "dtype", "quantize", "read", "renew", "renumber", "write"]


@struct.dataclass
class Quantized:
    """Codes with their scales, and the ring of recent rows in full precision."""

    codes: Leaf  # [B R D] uint8, or [B R D/2] with two 4-bit codes a byte
    scale: Leaf  # [B R 1] per token, or [B ΣN D] per channel and block
    zero: Leaf  # as scale
    recent: Leaf  # [B K W D]
    slot: Leaf  # [B K W] int32 packed row of each recent vector, R = none
    turn: Leaf  # [B K] int32, where the ring is written next
    bits: int = struct.field(pytree_node=False)
    block: int | None = struct.field(pytree_node=False)  # slots per key block; None = per token
    slots: tuple[int, ...] = struct.field(pytree_node=False)

    def as_codes(self) -> Codes:
        """Returns the codes as kernels read them, without the ring."""
        return Codes(self.codes, self.scale, self.zero, self.bits, self.block)


def read(store: Any) -> Float[Array, "B R D"]:
    """Returns every row in full precision. Empty rows hold anything."""
    if not isinstance(store, Quantized):
        return store
    rows = decode_codes(store.as_codes(), store.slots).astype(store.recent.dtype)
    batch = jnp.arange(rows.shape[0])[:, None, None]
    return rows.at[batch, store.slot].set(store.recent, mode="drop")


def dtype(store: Any) -> jnp.dtype:
    """Returns the type of the rows that `read` gives."""
    return store.recent.dtype if isinstance(store, Quantized) else store.dtype


def renew(store: Any, x: Float[Array, "B Q D"], mass: Packed, order: Packed, slots: Sequence[int]) -> Any:
    """Returns a store of the same kind that holds these rows instead; see `quantize` for mass and order."""
    if not isinstance(store, Quantized):
        return x
    how = {"bits": store.bits, "block": store.block, "window": store.slot.shape[2], "slots": tuple(slots)}
    return quantize(x, mass, order, how)


def renumber(store: Any, first: Any, slots: tuple[int, ...]) -> Any:
    """Returns a store of part of the heads, or one put back, whose rows count from the old row `first`."""
    if not isinstance(store, Quantized):
        return store
    slot = jnp.where(store.slot < sum(store.slots), store.slot - first, sum(slots))
    return store.replace(slot=slot.astype(jnp.int32), slots=slots)


def write(
    stores: Sequence[Quantized], idx: Slots, rows: Sequence[Float[Array, "B K T D"]], mass: Packed
) -> list[Quantized]:
    """Writes one vector per head and token to packed rows idx (R = drop) of stores; mass as after the write.

    Raises:
        NotImplementedError: for several tokens at once; widen the cache first.
    """
    if idx.shape[2] != 1:
        raise NotImplementedError(
            f"a quantised store takes one token at a time, got T={idx.shape[2]}: widen the cache first"
        )
    codes, rings = write_codes(
        [x.as_codes() for x in stores],
        [Ring(x.recent, x.slot, x.turn) for x in stores],
        [row[:, :, 0].astype(x.recent.dtype) for row, x in zip(rows, stores, strict=True)],
        idx[..., 0], mass, slots=stores[0].slots,
    )  # fmt: skip
    return [
        x.replace(codes=c.codes, scale=c.scale, zero=c.zero, recent=r.rows, slot=r.slot, turn=r.turn)
        for x, c, r in zip(stores, codes, rings, strict=True)
    ]


def quantize(x: Float[Array, "B R D"], mass: Packed, order: Packed, store: dict) -> Quantized:
    """Quantises dense rows; `order` ranks slots by age, the newest fill the recent ring.

    store: `bits` (4 or 8), `block` (slots per key block, None = per token), `window` (ring
    size), `slots` (capacity per head).
    """
    bits, block, slots = store["bits"], store["block"], store["slots"]
    batch, n_rows, _ = x.shape
    clean = jnp.where((mass > 0)[..., None], x, 0)
    if block is None:
        codes, scale, zero = encode(clean, bits, axis=-1)
    else:
        rows = block_rows(slots, block)  # [ΣN P]
        inside = rows < n_rows
        at = np.where(inside, rows, 0)
        alive = (mass[:, at] > 0) & inside
        codes, scale, zero = encode(clean[:, at], bits, axis=2, alive=alive[..., None])
        full = jnp.zeros((batch, n_rows, codes.shape[-1]), codes.dtype)
        codes = full.at[:, rows].set(codes, mode="drop")
        scale, zero = scale[:, :, 0], zero[:, :, 0]
    recent, slot = _newest(clean, mass, order, slots, store["window"])
    turn = jnp.zeros(slot.shape[:2], jnp.int32)
    return Quantized(codes, scale, zero, recent, slot, turn, bits, block, tuple(slots))


def _newest(x: Array, mass: Array, order: Array, slots: tuple[int, ...], window: int) -> tuple[Array, Array]:
    """Returns the newest `window` rows of each head, oldest first, and their packed rows."""
    recent, slot, row = [], [], 0
    for size in slots:
        part = slice(row, row + size)
        age = jnp.where(mass[:, part] > 0, order[:, part].astype(jnp.float32), -jnp.inf)
        n = min(window, size)
        when, best = jax.lax.top_k(age, n)
        best, when = best[:, ::-1], when[:, ::-1]
        at = jnp.pad(
            jnp.where(when > -jnp.inf, best + row, x.shape[1]),
            ((0, 0), (window - n, 0)),
            constant_values=x.shape[1],
        )
        slot.append(at)
        recent.append(jnp.take_along_axis(x, jnp.minimum(at, x.shape[1] - 1)[..., None], axis=1))
        row += size
    return jnp.stack(recent, axis=1), jnp.stack(slot, axis=1).astype(jnp.int32)
