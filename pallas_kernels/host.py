"""Lays rows out in host memory, and reads them there by XLA alone."""

import math
import types
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, Shaped

from pallas_kernels.attention import Codes, decode_codes, starts

__all__ = [
    "RUN", "Blocks", "Pages", "as_pages", "as_rows", "empty_pages", "on_host", "pack", "pairs", "pinned",
    "take_rows", "unpack", "unpaired",
]  # fmt: skip

RUN = 32  # rows in a tile of the smallest type: what a TPU reads and writes as a whole
_LANES = 256  # a TPU's copies from host memory take whole tiles of 4 KiB, two in a row at least
_PAGE = 8 * 4 * _LANES  # bytes of a row of tiles


@dataclass(frozen=True)
class Blocks:
    """How rows that are moved together lie: capacity of each KV head, and slots per block."""

    slots: tuple[int, ...]
    size: int = 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks of each head, the last of which may be cut short."""
        return tuple(-(-s // self.size) for s in self.slots)


def on_host(*trees: object) -> bool:
    """Says whether any array lies in host memory.

    Example:
        >>> on_host(jnp.ones(2)), on_host(jax.device_put(jnp.ones(2), jax.memory.Space.Host))
        (False, True)
    """
    spaces = (jax.typeof(x).memory_space for x in jax.tree.leaves(trees))
    return jax.memory.Space.Host in spaces


def pinned(n_bytes: int) -> np.ndarray | None:
    """Returns bytes of host memory that a GPU copies from at the full rate of its bus; None without a GPU.

    They are a JAX array that no program is given, so they may be written to.
    """
    if jax.default_backend() != "gpu":
        return None
    memory = jax.device_put(np.zeros(n_bytes, np.uint8), jax.memory.Space.Host)
    held = types.SimpleNamespace(
        memory=memory,  # lives as long as what is made of it
        __array_interface__={
            "data": (memory.unsafe_buffer_pointer(), False), "shape": (n_bytes,), "typestr": "|u1",
            "version": 3,
        },
    )  # fmt: skip
    return np.asarray(held)


def pairs(store: Codes) -> Codes:
    """Returns 8-bit codes of rows [.. 2R D], with a scale each, as words [.. R D] of two and scales [.. R 2].

    A kernel's offsets are 32 bits wide up to 4 GiB: more than 2^31 bytes of an array are out of its reach,
    and as many words are not.
    """
    halved = lambda x: x.reshape(*x.shape[:-2], -1, 2, x.shape[-1])  # noqa: E731
    low, high = jnp.moveaxis(halved(store.codes).astype(jnp.uint16), -2, 0)
    scales = (halved(x)[..., 0] for x in (store.scale, store.zero))
    return Codes(low | high << 8, *scales, store.bits, store.block)


def unpaired(store: Codes) -> Codes:
    """Returns what `pairs` was made of."""
    codes = jnp.stack([store.codes & 255, store.codes >> 8], axis=-2).astype(jnp.uint8)
    codes = codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])
    scales = (x.reshape(*x.shape[:-2], -1, 1) for x in (store.scale, store.zero))
    return Codes(codes, *scales, store.bits, store.block)


def take_rows(x: Array, at: Int[Array, "B *n P"]) -> Array:
    """Returns rows of x [B R E], on the device; of an array on the host, P at a time, which lie together."""
    if not on_host(x):
        return jax.vmap(lambda rows, i: rows[i])(x, at)
    # XLA gathers from no host array, but reads slices of one, along one axis and (on TPU) in whole tiles.
    flat = x.reshape(-1, x.shape[2])
    n = min(-(-at.shape[-1] // RUN) * RUN + RUN, len(flat))
    at = at + (jnp.arange(len(at)) * x.shape[1]).reshape(-1, *(1,) * (at.ndim - 1))

    def read(_, rows):
        first = jnp.minimum(rows[0] // RUN * RUN, len(flat) - n)
        run = jax.lax.dynamic_slice(flat, (first, 0), (n, x.shape[2]))
        return None, jax.device_put(run, jax.memory.Space.Device)[rows - first]

    return jax.lax.scan(read, None, at.reshape(-1, at.shape[-1]))[1].reshape(*at.shape, -1)


@struct.dataclass
class Pages:
    """Rows in whole blocks of 32-bit words, which is how a TPU copies from host memory.

    Every head begins with a block of its own; beyond a head's capacity its last block holds anything.
    """

    words: Any  # [B ΣN U 256] int32, U a multiple of 8; see `pack`
    dtype: Any = struct.field(pytree_node=False)  # of the rows
    head_dim: int = struct.field(pytree_node=False)  # D

    @property
    def block(self) -> int:
        """Slots of a block, P."""
        return math.prod(self.words.shape[2:]) * 4 // (self.head_dim * self.dtype.itemsize)


def empty_pages(batch: int, blocks: Blocks, head_dim: int, dtype: Any) -> Pages:
    """Makes pages of zeros.

    Raises:
        ValueError: for blocks that are no whole pages.

    Example:
        >>> pages = empty_pages(1, Blocks((80, 32), 32), 128, jnp.bfloat16)
        >>> pages.words.shape, pages.block
        ((1, 4, 8, 256), 32)
    """
    dtype = jnp.dtype(dtype)
    row_bytes = head_dim * dtype.itemsize
    if blocks.size * row_bytes % _PAGE or 4 % dtype.itemsize:
        raise ValueError(
            f"from host memory a TPU copies whole pages of {_PAGE // 1024} KiB, got blocks of {blocks.size} "
            f"rows of {row_bytes} bytes: take a multiple of {_PAGE // math.gcd(_PAGE, row_bytes)} rows"
        )
    shape = (batch, sum(blocks.counts), blocks.size * row_bytes // (4 * _LANES), _LANES)
    return Pages(jnp.zeros(shape, jnp.int32), dtype, head_dim)


def pack(rows: Shaped[Array, "*n P D"]) -> Int[Array, "*n U 256"]:
    """Returns blocks as words: a word holds one channel of 4 / itemsize rows, equally far apart.

    So a TPU unpacks by shifts. Neighbouring channels in a word would be an axis of two, which it pads to 128.
    """
    size = rows.dtype.itemsize
    kind = jnp.dtype(f"uint{8 * size}")
    parts = jnp.split(jax.lax.bitcast_convert_type(rows, kind).astype(jnp.uint32), 4 // size, axis=-2)
    words = sum(part << (8 * size * i) for i, part in enumerate(parts))
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(*rows.shape[:-2], -1, _LANES)


def unpack(words: Int[Array, "*n U 256"], dtype: Any, head_dim: int) -> Shaped[Array, "*n P D"]:
    """Returns the rows of blocks that `pack` made."""
    size = jnp.dtype(dtype).itemsize
    kind = jnp.dtype(f"uint{8 * size}")
    words = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(*words.shape[:-2], -1, head_dim)
    parts = [(words >> (8 * size * i)).astype(kind) for i in range(4 // size)]
    return jax.lax.bitcast_convert_type(jnp.concatenate(parts, axis=-2), dtype)


def as_pages(x: Shaped[Array, "B R D"], blocks: Blocks) -> Pages:
    """Returns pages that hold the packed rows of all heads.

    Raises:
        ValueError: for blocks that are no whole pages.
    """
    pages, parts = empty_pages(x.shape[0], blocks, x.shape[2], x.dtype), []
    for at, size, n in zip(starts(blocks.slots), blocks.slots, blocks.counts, strict=False):
        rows = jnp.pad(x[:, at : at + size], ((0, 0), (0, n * blocks.size - size), (0, 0)))
        parts.append(rows.reshape(x.shape[0], n, blocks.size, x.shape[2]))
    return pages.replace(words=pack(jnp.concatenate(parts, axis=1)))


def as_rows(store: Any, slots: tuple[int, ...]) -> Shaped[Array, "B R D"]:
    """Returns the rows of a store that lies on the device, in float32 where it holds codes."""
    if not isinstance(store, Pages):
        return decode_codes(store, slots)
    blocks = Blocks(slots, store.block)
    rows = unpack(store.words, store.dtype, store.head_dim).reshape(len(store.words), -1, store.head_dim)
    if rows.shape[1] == sum(slots):
        return rows
    first = starts(blocks.counts) * blocks.size
    at = np.concatenate([at + np.arange(size) for at, size in zip(first, slots, strict=False)])
    return rows[:, at]
