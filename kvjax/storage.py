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
from pallas_kernels import Codes

__all__ = ["Quantized", "blocks", "dtype", "encode", "quantize", "read", "renew", "renumber", "write"]


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
    rows = _decode(store, store.codes, _spread(store, store.scale), _spread(store, store.zero))
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


def write(store: Quantized, idx: Slots, x: Float[Array, "B K T D"], mass: Packed) -> Any:
    """Writes one vector per head and token to packed rows idx (R = drop); mass as after the write.

    Raises:
        NotImplementedError: for several tokens at once; widen the cache first.
    """
    batch = jnp.arange(idx.shape[0])[:, None, None]
    if idx.shape[2] != 1:
        raise NotImplementedError(
            f"a quantised store takes one token at a time, got T={idx.shape[2]}: widen the cache first"
        )
    store = _remember(store, idx, x)
    if store.block is None:
        codes, scale, zero = encode(x, store.bits, axis=-1)
        return store.replace(
            codes=store.codes.at[batch, idx].set(codes, mode="drop"),
            scale=store.scale.at[batch, idx].set(scale, mode="drop"),
            zero=store.zero.at[batch, idx].set(zero, mode="drop"),
        )
    return _rewrite_block(store, idx[..., 0], mass)


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
        rows, inside = blocks(slots, block)
        at = np.where(inside, rows, 0)  # [ΣN P]
        alive = (mass[:, at] > 0) & inside
        codes, scale, zero = encode(clean[:, at], bits, axis=2, alive=alive[..., None])
        full = jnp.zeros((batch, n_rows + 1, codes.shape[-1]), codes.dtype)
        codes = full.at[:, np.where(inside, rows, n_rows)].set(codes)[:, :n_rows]
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


def _remember(store: Quantized, idx: Slots, x: Array) -> Quantized:
    """Puts one new row per head into the ring, and forgets an older row of the same slot."""
    window = store.slot.shape[2]
    here = jnp.arange(window)[None, None, :] == store.turn[:, :, None]
    n_rows = sum(store.slots)
    slot = jnp.where(store.slot == idx, n_rows, store.slot)
    written = idx < n_rows
    slot = jnp.where(here & written, idx, slot).astype(jnp.int32)
    recent = jnp.where((here & written)[..., None], x.astype(store.recent.dtype), store.recent)
    turn = jnp.where(written[..., 0], (store.turn + 1) % window, store.turn)
    return store.replace(recent=recent, slot=slot, turn=turn)


def _rewrite_block(store: Quantized, idx: Array, mass: Array) -> Quantized:
    """Quantises the block of each head that holds packed row idx [B K] again."""
    n_rows = sum(store.slots)
    rows, inside = blocks(store.slots, store.block)
    n_blocks = len(rows)
    which = jnp.asarray(np.append(_owner(store.slots, store.block), n_blocks))[idx]  # [B K], n_blocks = none
    safe = jnp.minimum(which, n_blocks - 1)
    row = jnp.where(jnp.asarray(inside)[safe], jnp.asarray(rows)[safe], n_rows)  # [B K P]
    at = jnp.minimum(row, n_rows - 1)
    batch = jnp.arange(idx.shape[0])[:, None]
    scale, zero = store.scale[batch, safe][:, :, None], store.zero[batch, safe][:, :, None]
    x = _decode(store, store.codes[batch[..., None], at], scale, zero)  # [B K P D]
    match = store.slot[:, :, None, :] == row[..., None]  # [B K P W]
    exact = jnp.take_along_axis(store.recent, jnp.argmax(match, -1)[..., None], axis=2)
    x = jnp.where((match.any(-1) & (row < n_rows))[..., None], exact, x)
    alive = (mass[batch[..., None], at] > 0) & (row < n_rows)
    codes, scale, zero = encode(x, store.bits, axis=2, alive=alive[..., None])
    target = jnp.where((which < n_blocks)[..., None], row, n_rows)
    return store.replace(
        codes=store.codes.at[batch[..., None], target].set(codes, mode="drop"),
        scale=store.scale.at[batch, which].set(scale[:, :, 0], mode="drop"),
        zero=store.zero.at[batch, which].set(zero[:, :, 0], mode="drop"),
    )


def blocks(slots: tuple[int, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the packed rows of every block [ΣN P], and which of them exist."""
    rows, inside, first = [], [], 0
    for size in slots:
        at = np.arange(-(-size // block) * block).reshape(-1, block)
        rows.append(first + at)
        inside.append(at < size)
        first += size
    return np.concatenate(rows), np.concatenate(inside)


def _owner(slots: tuple[int, ...], block: int) -> np.ndarray:
    """Returns the block of every packed row, [R]."""
    owner, first = [], 0
    for size in slots:
        owner.append(first + np.arange(size) // block)
        first += -(-size // block)
    return np.concatenate(owner)


def _spread(store: Quantized, x: Array) -> Array:
    """Gives every row its own scale or zero."""
    return x if store.block is None else x[:, _owner(store.slots, store.block)]


def encode(x: Array, bits: int, axis: int, alive: Array | None = None) -> tuple[Array, Array, Array]:
    """Returns codes, scale and zero over `axis`; rows that are not alive do not stretch the range."""
    x32 = x.astype(jnp.float32)
    seen = jnp.ones((), bool) if alive is None else alive
    low = jnp.min(jnp.where(seen, x32, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(seen, x32, -jnp.inf), axis=axis, keepdims=True)
    low, high = (jnp.where(jnp.isfinite(edge), edge, 0.0) for edge in (low, high))
    scale = jnp.maximum(high - low, 1e-8) / (2**bits - 1)
    scale, low = scale.astype(x.dtype), low.astype(x.dtype)
    codes = jnp.round((x32 - low.astype(jnp.float32)) / scale.astype(jnp.float32))
    codes = jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scale, low


def _decode(store: Quantized, codes: Array, scale: Array, zero: Array) -> Array:
    """Returns the values of codes in the type of the recent ring."""
    if store.bits == 4:
        codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    return (codes.astype(jnp.float32) * scale + zero).astype(store.recent.dtype)
