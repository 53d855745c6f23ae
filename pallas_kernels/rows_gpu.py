"""Loads rows of a store in Pallas Triton, and decodes those that are stored as codes.

With 4-bit codes a row has two parts, the channels in the low and in the high halves of its bytes.
E2 pads the channels of a part to a power of 2. Codes become float16, whose 11 bits hold them and which
a byte becomes in one instruction; rows beyond 65,504 overflow. With float32 queries they become float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Codes
from pallas_kernels.backend import pl, triton
from pallas_kernels.instructions import assemble

__all__ = [
    "bare_rows",
    "decode_rows",
    "gain",
    "has_row_scales",
    "lanes",
    "load_halves",
    "load_rows",
    "n_parts",
    "rotated",
    "store_halves",
    "store_kind",
    "turn",
]


def lanes(n: int) -> int:
    """Returns the power of two, 16 at least, that n channels or queries are padded to."""
    return max(16, pl.next_power_of_2(n))


def store_kind(store: Any) -> str:
    """Returns the word for a store's elements in keys of settings."""
    return f"int{store.bits}" if isinstance(store, Codes) else str(store.dtype)


def n_parts(store: Any) -> int:
    """Returns how many channels a stored element holds."""
    return 8 // store.bits if isinstance(store, Codes) else 1


def has_row_scales(store: Any) -> bool:
    """Returns whether rows are codes with a scale and a zero of their own each."""
    return isinstance(store, Codes) and store.block is None


def load_rows(store: Any, place: tuple, alive: jax.Array | None) -> tuple:
    """Loads rows of a store as they lie, for `decode_rows`.

    place: batch row, packed rows [P], and the block of scales of each [P] or of the first, where
    rows follow each other. alive: [P], rows to load; the others are zeros. None for all, without a mask, for
    which registers would have to be cleared.
    """
    batch, row, code_block = place
    codes = store.codes if isinstance(store, Codes) else store
    channel = jnp.arange(lanes(codes.shape[-1]))
    inside = (channel < codes.shape[-1])[None, :]
    if alive is None:
        mask = None if channel.size == codes.shape[-1] else inside & jnp.full((row.size, 1), True)
    else:
        mask = inside & alive[:, None]
    if not isinstance(store, Codes):
        return (_load(codes.at[batch, row[:, None], channel[None, :]], mask),)
    per = store.block if store.block is not None and not code_block.ndim else row.size
    row = row.reshape(-1, per)
    alive, mask = (x if x is None else x.reshape(*row.shape, *x.shape[1:]) for x in (alive, mask))
    x = _load(codes.at[batch, row[:, :, None], channel[None, None, :]], mask)
    code_block = code_block.reshape(row.shape) if code_block.ndim else code_block
    scales = (_scales(store, ref, (batch, row, code_block), alive) for ref in (store.scale, store.zero))
    return (x, *scales)


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    """Loads what a mask allows, and zeros for the rest; without one all."""
    return triton.load(ref) if mask is None else triton.load(ref, mask=mask, other=0)


def _scales(store: Codes, ref: Any, place: tuple, alive: jax.Array | None) -> jax.Array:
    """Loads scales, or zeros, of rows [N P]: [N P], or [N E2 parts] per block, or [N P E2 parts]."""
    batch, row, code_block = place
    if store.block is None:
        return _load(ref.at[batch, row, 0], alive)
    parts, width = n_parts(store), store.codes.shape[-1]
    channel, part = jnp.arange(lanes(width)), jnp.arange(parts)
    if not code_block.ndim:  # the blocks that follow; beyond the last slot it does not matter which
        code_block, alive = jnp.minimum(code_block + jnp.arange(row.shape[0]), ref.shape[1] - 1), None
    lead = (1,) * code_block.ndim
    at = (channel[:, None] * parts + part[None, :]).reshape(*lead, -1, parts)  # as they lie
    mask = (channel < width).reshape(*lead, -1, 1) & jnp.full((*code_block.shape, 1, parts), True)
    if alive is not None:
        mask = mask & alive[..., None, None]
    return _load(ref.at[batch, code_block[..., None, None], at], mask)


def bare_rows(
    store: Any, loaded: tuple, alive: jax.Array, dtype: Any
) -> tuple[list[jax.Array], tuple | None]:
    """Returns the parts of rows as `decode_rows` does; of codes with a scale per row the codes alone.

    Their scales, `gain` times as large, and zeros [P] come second, 0 of those not alive; None for other rows.
    """
    if not has_row_scales(store):
        return decode_rows(store, loaded, alive, dtype), None
    x, *pair = loaded
    parts = [_bare(x, store.bits, i, _decoded(dtype)) for i in range(n_parts(store))]
    scale, zero = (jnp.where(alive, y.reshape(-1).astype(jnp.float32), 0.0) for y in pair)
    return [part.reshape(-1, part.shape[-1]) for part in parts], (scale * gain(store), zero)


def gain(store: Codes) -> float:
    """Returns what scales are multiplied by: small weights times scales stay above float16's least.

    Those of rows up to 65,504 stay below its largest: a scale is a range over the largest code.
    """
    return 2.0 ** (store.bits - 2)


def _decoded(dtype: Any) -> Any:
    """Returns the type that codes become for queries of a type."""
    return jnp.float32 if dtype == jnp.float32 else jnp.float16


def decode_rows(store: Any, loaded: tuple, alive: jax.Array | None, dtype: Any) -> list[jax.Array]:
    """Returns what `load_rows` loaded as parts, each [P E2]; of those not alive, zeros.

    None for alive: what the others are does not matter.
    """
    if not isinstance(store, Codes):
        return list(loaded)
    dtype = _decoded(dtype)
    x, scale, zero = loaded
    if store.block is None:
        scales, zeros = ([y.astype(dtype)[:, :, None]] * n_parts(store) for y in (scale, zero))
    else:
        scales, zeros = (_split_parts(y, dtype) for y in (scale, zero))
    parts = [_decode(x, store.bits, i, *y) for i, y in enumerate(zip(scales, zeros, strict=True))]
    if alive is not None:
        parts = [jnp.where(alive.reshape(x.shape[:2])[:, :, None], part, 0) for part in parts]
    return [part.reshape(-1, part.shape[-1]) for part in parts]


def _split_parts(x: jax.Array, dtype: Any) -> list[jax.Array]:
    """Returns the parts of scales [.. E2 parts] as [N P E2] or [N 1 E2]."""
    part, x32 = jnp.arange(x.shape[-1]), x.astype(jnp.float32)
    each = [jnp.sum(jnp.where(part == j, x32, 0.0), axis=-1).astype(dtype) for j in range(part.size)]
    return [y if y.ndim == 3 else y[:, None] for y in each]


# Four bytes become float16: a code in the low bits of 1024, less 1024; then with a scale and a zero each.
_BARE = """{
    .reg .b32 code, one;
    mov.b32 one, 0x64006400;
    %s
    prmt.b32 $0, code, one, 0x5150;
    prmt.b32 $1, code, one, 0x5352;
    sub.f16x2 $0, $0, one;
    sub.f16x2 $1, $1, one;
"""
_SCALE = """
    fma.rn.f16x2 $0, $0, $3, $5;
    fma.rn.f16x2 $1, $1, $4, $6;
"""
_PICK = {  # by bits and part
    (8, 0): "mov.b32 code, $2;",
    (4, 0): "and.b32 code, $2, 0x0f0f0f0f;",
    (4, 1): "shr.u32 code, $2, 4; and.b32 code, code, 0x0f0f0f0f;",
}


def _code(byte: jax.Array, bits: int, part: int) -> jax.Array:
    return byte if bits == 8 else byte >> 4 if part else byte & 15


def _bare(byte: jax.Array, bits: int, part: int, dtype: Any) -> jax.Array:
    """Returns the code of all bits, or of those in one half of a byte, as a number."""
    plain = lambda byte: _code(byte, bits, part).astype(dtype)  # noqa: E731
    if dtype == jnp.float32:
        return plain(byte)
    options = {"dtype": dtype, "constraints": "=&r,=&r,r", "pack": 4}
    return assemble(_BARE % _PICK[bits, part] + "}", byte, plain=plain, **options)


def _decode(byte: jax.Array, bits: int, part: int, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Returns code * scale + zero, of all bits or of those in one half of a byte."""
    plain = lambda byte, scale, zero: _code(byte, bits, part).astype(scale.dtype) * scale + zero  # noqa: E731
    if scale.dtype == jnp.float32:
        return plain(byte, scale, zero)
    options = {"dtype": scale.dtype, "constraints": "=&r,=&r,r,r,r,r,r", "pack": 4}
    return assemble(_BARE % _PICK[bits, part] + _SCALE + "}", byte, scale, zero, plain=plain, **options)


def _half(ref, batch, row, mask, start: int):
    """Returns where half of the channels of some rows lie, those from `start` on, and which are any."""
    half = ref.shape[2] // 2
    d = jnp.arange(lanes(half))
    return ref.at[batch, row[:, None], (start + d)[None, :]], mask[:, None] & (d < half)[None, :]


def load_halves(ref, batch, row, mask):
    """Loads the two halves of rows [X] of [B R D], as [X E] each."""
    places = [_half(ref, batch, row, mask, start) for start in (0, ref.shape[2] // 2)]
    return [triton.load(at, mask=inside, other=0) for at, inside in places]


def store_halves(ref, batch, row, pair, mask):
    """Stores the two halves of rows [X]."""
    # Interpreted, what is masked is written back as it was, over what was written: not inside, then.
    row = jnp.where(mask, row, ref.shape[1])
    for start, x in zip((0, ref.shape[2] // 2), pair, strict=True):
        at, inside = _half(ref, batch, row, mask, start)
        triton.store(at, x.astype(ref.dtype), mask=inside)


def turn(pair, pos, frequency_ref, back: bool):
    """Rotates the halves of rows by their positions (rotary embedding), or back."""
    d = jnp.arange(pair[0].shape[1])
    frequency = triton.load(frequency_ref.at[d], mask=d < frequency_ref.shape[0], other=0)
    angle = pos[:, None] * frequency[None, :]
    return rotated(pair, jnp.cos(angle), jnp.sin(-angle if back else angle))


def rotated(pair, cos, sin):
    """Rotates the halves of rows by angles of these cosines and sines."""
    a, b = pair
    return [a * cos - b * sin, b * cos + a * sin]
