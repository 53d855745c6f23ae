"""Row copies on TPU: whole blocks by DMA, from host memory too, and staged rows over them by XLA.

A DMA moves whole tiles: blocks of 8 or more slots (float32; 16 of bfloat16) and rows of a multiple of
128 channels. Anything else XLA gathers, if it lies on the device.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Codes
from pallas_kernels.backend import pl, pltpu, tpu_call
from pallas_kernels.fetch_rows import reference
from pallas_kernels.host import Blocks, on_host

__all__ = ["run"]

_LANES = 128
_UNDER_WAY = 16  # copies at once


def run(near, far, staged, idx, line, first, *, blocks: Blocks):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for rows in host memory that no DMA moves.
    """
    (batch, n_heads, window, size), slots, block = staged.shape, blocks.slots, blocks.size
    tiles = size % _LANES == 0 and block * near.dtype.itemsize % 32 == 0 and not any(s % block for s in slots)
    if isinstance(far, Codes) or not tiles:
        if on_host(far):
            raise NotImplementedError(
                f"from host memory whole tiles are copied: rows of a multiple of {_LANES} channels, blocks "
                f"of 32 bytes a channel, heads of whole blocks, no codes, got D={size}, {block=} and {slots=}"
            )
        return reference.run(near, far, staged, idx, line, first, blocks=blocks)
    per_head = near.shape[1] // n_heads
    near = _blocks(near, far, idx, line, slots=slots, block=block)
    slot = first[..., None] + jnp.arange(window)  # [B K W]
    match = (idx[:, :, None] == (slot // block)[..., None]) & (line >= 0)[:, :, None]  # [B K W N]
    to = jnp.take_along_axis(line, jnp.argmax(match, -1), axis=2) * block + slot % block
    alive = match.any(-1) & (slot < jnp.asarray(slots)[:, None])
    to = jnp.where(alive, jnp.arange(n_heads)[:, None] * per_head + to, near.shape[1])
    return near.at[jnp.arange(batch)[:, None, None], to].set(staged, mode="drop")


def _blocks(near, far, idx, line, *, slots, block):
    """Copies the blocks that are named from far to near."""
    first = tuple(sum(slots[:k]) for k in range(len(slots)))
    place = pl.BlockSpec(memory_space=pltpu.HBM)
    source = pl.BlockSpec(memory_space=pl.HOST) if on_host(far) else place
    return tpu_call(
        functools.partial(_copy, per_head=near.shape[1] // len(slots), block=block),
        idx, line, jnp.asarray(first, jnp.int32), jnp.asarray(slots, jnp.int32), near, far,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(),
            in_specs=[place, source],
            out_specs=place,
            scratch_shapes=[pltpu.SemaphoreType.DMA((_UNDER_WAY,))],
        ),
        out_shape=jax.ShapeDtypeStruct(near.shape, near.dtype), aliases={4: 0},
        semantics=(), vmem_bytes=2**20, name="fetch_rows",
    )  # fmt: skip


def _copy(idx_ref, line_ref, first_ref, slots_ref, _, far_ref, out_ref, sems, *, per_head, block):
    """Copies all blocks in turn, each when the copy that had its semaphore is done."""
    batch, n_heads, n = idx_ref.shape
    under_way = sems.shape[0]

    def on(i, act):
        row, at = jax.lax.div(i, n), jax.lax.rem(i, n)
        b, head = jax.lax.div(row, n_heads), jax.lax.rem(row, n_heads)
        chosen, line = idx_ref[b, head, at], line_ref[b, head, at]

        @pl.when((chosen >= 0) & (line >= 0) & (chosen * block < slots_ref[head]))
        def _():
            at = pl.multiple_of(first_ref[head] + chosen * block, block)
            to = pl.multiple_of(head * per_head + line * block, block)
            source, target = far_ref.at[b, pl.ds(at, block)], out_ref.at[b, pl.ds(to, block)]
            act(pltpu.make_async_copy(source, target, sems.at[jax.lax.rem(i, under_way)]))

    @pl.loop(0, batch * n_heads * n + under_way)  # an operand in host memory allows no grid
    def _(i):
        @pl.when(i >= under_way)
        def _():
            on(i - under_way, lambda copy: copy.wait())

        @pl.when(i < batch * n_heads * n)
        def _():
            on(i, lambda copy: copy.start())
