"""Bounds of blocks in Pallas Triton.

A program takes a tile of M neighbouring blocks of a head and walks through their slots in step, so
that a minimum never crosses threads. D2 pads the channels to a power of 2.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.attention import starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """tile: blocks per program. unroll: slots of each block that are on their way at once."""

    tile: int = 16
    unroll: int = 8
    warps: int = 4


def run(k, mass, *, slots, block):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take.
    """
    if k.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"the kernel takes float32, bfloat16 and float16, got {k.dtype=}: convert it"
        )
    batch, rows, size = k.shape
    chosen = tuning.settings(
        "block_bounds", Settings(), dtype=str(k.dtype), head_dim=size, block=block, rows=batch * rows
    )
    items = _items(slots, block, chosen.tile)
    n_blocks = sum(-(-s // block) for s in slots)
    return tuple(
        gpu_call(
            functools.partial(_bound, block=block, tile=chosen.tile, unroll=chosen.unroll),
            jnp.asarray(items), k, mass,
            grid=(len(items), batch),
            out_shape=(jax.ShapeDtypeStruct((batch, n_blocks, size), k.dtype),) * 2,
            warps=chosen.warps, stages=1, name="block_bounds",
        )
    )  # fmt: skip


def _items(slots: tuple[int, ...], block: int, tile: int) -> np.ndarray:
    """Returns the work [I 3]: first packed row, slots from there on, first packed block."""
    first, first_block = starts(slots), starts(tuple(-(-size // block) for size in slots))
    return np.array(
        [
            (first[head] + at, min(size - at, tile * block), first_block[head] + at // block)
            for head, size in enumerate(slots)
            for at in range(0, size, tile * block)
        ],
        np.int32,
    )


def _bound(
    items_ref,  # [I 3] first row, slots, first block
    k_ref,  # [B R D]
    mass_ref,  # [B R]
    low_ref,  # [B N D]
    high_ref,  # [B N D]
    *,
    block: int,  # P
    tile: int,  # M
    unroll: int,
):
    """Bounds the keys of one tile of blocks."""
    item, batch = program_id(0), program_id(1)
    row, n, first = (items_ref[item, i] for i in range(3))
    size = k_ref.shape[2]
    at, d = jnp.arange(tile), jnp.arange(max(16, pl.next_power_of_2(size)))

    def take(i, bounds):  # slot i of every block
        slot = at * block + i
        mask = (slot < n) & (i < block)
        alive = triton.load(mass_ref.at[batch, row + slot], mask=mask, other=0.0) > 0
        alive = alive[:, None] & (d < size)[None, :]
        place = k_ref.at[batch, (row + slot)[:, None], d[None, :]]
        x = triton.load(place, mask=alive, other=0).astype(jnp.float32)  # a slot of no mass is not read
        low, high = bounds
        return jnp.minimum(low, jnp.where(alive, x, jnp.inf)), jnp.maximum(
            high, jnp.where(alive, x, -jnp.inf)
        )

    def step(i, bounds):
        for j in range(min(unroll, block)):
            bounds = take(i * unroll + j, bounds)
        return bounds

    bounds = (jnp.full((tile, d.size), jnp.inf), jnp.full((tile, d.size), -jnp.inf))
    bounds = jax.lax.fori_loop(0, -(-block // unroll), step, bounds)
    mask = (at * block < n)[:, None] & (d < size)[None, :]
    for ref, bound in zip((low_ref, high_ref), bounds, strict=True):
        triton.store(ref.at[batch, (first + at)[:, None], d[None, :]], bound.astype(ref.dtype), mask=mask)
