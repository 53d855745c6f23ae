"""What the attention ops share: their static form, and stores of integer codes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from pallas_kernels.backend import debug_check

__all__ = [
    "AttentionForm",
    "Codes",
    "block_rows",
    "check_attention",
    "check_scales",
    "code_blocks",
    "decode_codes",
    "encode",
    "extent",
    "join",
    "quantize",
    "read_length",
    "starts",
]


@dataclass(frozen=True)
class AttentionForm:
    """Static form of attention over packed heads.

    slots: capacity of each KV head; the heads lie one after the other on the packed axis R.
    scale: factor of q·k, None for 1/√D. softcap: c in c·tanh(logit/c), or None. lse: also return
    the natural log-sum-exp of the logits. holes: a head whose last slot has mass is read in full, since its
    length is where a hole is.
    """

    slots: tuple[int, ...]
    scale: float | None = None
    softcap: float | None = None
    lse: bool = False
    holes: bool = False

    def factor(self, head_dim: int) -> float:
        """Returns the factor of q·k."""
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale


@struct.dataclass
class Codes:
    """Rows as unsigned integer codes: value = code·scale + zero.

    With bits 4 a byte holds two neighbouring channels, the lower one in its low half. block: slots
    that share a scale per channel, counted from each head's first slot; None: one scale per row.
    """

    codes: Any  # [B R D] uint8, or [B R D/2] with 4 bits
    scale: Any  # [B ΣN D] per block and channel, or [B R 1] per row
    zero: Any  # as scale
    bits: int = struct.field(pytree_node=False)
    block: int | None = struct.field(pytree_node=False)


def starts(sizes: tuple[int, ...]) -> np.ndarray:
    """Returns where each of packed parts begins, and the total: [K+1]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def decode_codes(store: Any, slots: tuple[int, ...]) -> Array:
    """Returns the rows [B R D] of a store, in float32 where it holds codes."""
    if not isinstance(store, Codes):
        return store
    codes = store.codes
    if store.bits == 4:
        codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    scale, zero = (
        x if store.block is None else x[:, code_blocks(slots, store.block)] for x in (store.scale, store.zero)
    )
    return codes.astype(jnp.float32) * scale.astype(jnp.float32) + zero.astype(jnp.float32)


def extent(mass: Array, length: Array, slots: tuple[int, ...]) -> Array:
    """Returns how many slots of each head may have mass, [B K], by the rule of forms with `holes`."""
    last = starts(slots)[1:] - 1
    return jnp.where(mass[:, last] > 0, jnp.asarray(slots, length.dtype), length)


def read_length(mass: Array, length: Array, pos: Array | None, form: AttentionForm) -> Array:
    """Returns how many slots of each head are read, [B K]: none of a row that is padding."""
    length = extent(mass, length, form.slots) if form.holes else length
    return length if pos is None else jnp.where(pos[:, None] >= 0, length, 0)


def join(parts: Sequence[tuple[Array, Array]]) -> Array:
    """Joins attention over disjoint sets of slots, each given as its output and log-sum-exp.

    Example:
        >>> a, b = jnp.ones((1, 4)), jnp.zeros((1, 4))
        >>> float(join([(a, jnp.zeros(1)), (b, jnp.full(1, -jnp.inf))])[0, 0])
        1.0
    """
    lse = jnp.stack([part[1] for part in parts])
    top = jnp.max(lse, axis=0)
    weight = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weight.sum(0)
    weight = weight / jnp.where(total > 0, total, 1.0)
    out = sum(w[..., None] * part[0].astype(jnp.float32) for w, part in zip(weight, parts, strict=True))
    return out.astype(parts[0][0].dtype)


def code_blocks(slots: tuple[int, ...], block: int) -> np.ndarray:
    """Returns the block of scales of each packed row, [R]."""
    first = starts(tuple(-(-size // block) for size in slots))
    return np.concatenate([at + np.arange(size) // block for at, size in zip(first, slots, strict=False)])


def block_rows(slots: tuple[int, ...], block: int) -> np.ndarray:
    """Returns the packed rows of every block of scales, [ΣN P]; R beyond the last slot of a head."""
    rows = []
    for first, size in zip(starts(slots), slots, strict=False):
        at = np.arange(-(-size // block) * block)
        rows.append(np.where(at < size, first + at, sum(slots)))
    return np.concatenate(rows).reshape(-1, block)


def check_attention(q: Array, k: Any, v: Any, mass: Array, form: AttentionForm) -> None:
    """Raises ValueError where shapes disagree, and in debug mode where a mass is no mass."""
    batch, n_heads, _, size = q.shape
    if len(form.slots) != n_heads or min(form.slots) < 1:
        raise ValueError(f"a form has one positive capacity per KV head, got {form.slots=} for {q.shape=}")
    rows = sum(form.slots)
    for name, store in (("k", k), ("v", v)):
        shape = store.codes.shape if isinstance(store, Codes) else store.shape
        bits = store.bits if isinstance(store, Codes) else 8
        if bits not in (4, 8):
            raise ValueError(f"codes have 4 or 8 bits, got {name}.bits={bits}")
        if shape != (batch, rows, size * bits // 8):
            raise ValueError(
                f"{name} has a row per slot and the head size of q, {(batch, rows, size * bits // 8)}, "
                f"got {shape}: form.slots sum to R, and q is [B K G D]"
            )
        if isinstance(store, Codes):
            check_scales(name, store, form.slots, size)
    if mass.shape != (batch, rows):
        raise ValueError(f"there is one mass per slot, {(batch, rows)}, got {mass.shape=}")
    debug_check(lambda: jnp.all(mass >= 0), "a mass is a number of tokens: it is not negative and not NaN")


def check_scales(name: str, store: Codes, slots: tuple[int, ...], size: int) -> None:
    """Raises ValueError where scales do not fit the codes."""
    if store.block is None:
        shape = (*store.codes.shape[:2], 1)
    else:
        shape = (store.codes.shape[0], sum(-(-s // store.block) for s in slots), size)
    if store.scale.shape != shape or store.zero.shape != shape:
        raise ValueError(
            f"{name} has scales and zeros {shape}, got {store.scale.shape} and {store.zero.shape}: "
            f"one per row, or one per channel and block of slots"
        )


def encode(x: Array, bits: int, axis: int, alive: Array | None = None) -> tuple[Array, Array, Array]:
    """Returns codes, scale and zero over an axis; rows that are not alive do not stretch the range.

    With 4 bits two neighbours on the last axis share a byte. Scale and zero have x's type, and keep the axis.
    """
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


def quantize(x: Array, bits: int, slots: tuple[int, ...], block: int | None) -> Codes:
    """Returns the codes of rows [B R D], with scales in their type: for specs and users of the ops."""
    parts = []
    for at, size in zip(starts(slots), slots, strict=False):
        rows = x[:, at : at + size]
        if block is None:
            parts.append(encode(rows, bits, axis=2))
            continue
        rows = jnp.pad(rows, ((0, 0), (0, -size % block), (0, 0)), mode="edge")
        codes, *scales = encode(rows.reshape(x.shape[0], -1, block, x.shape[2]), bits, axis=2)
        codes = codes.reshape(x.shape[0], -1, codes.shape[-1])[:, :size]
        parts.append((codes, *(y.squeeze(2) for y in scales)))
    return Codes(*(jnp.concatenate(each, axis=1) for each in zip(*parts, strict=True)), bits, block)
