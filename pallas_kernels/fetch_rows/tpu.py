"""Row copies on TPU: whole pages by DMA, from host memory too, which XLA unpacks into the lines.

A DMA from host memory takes whole tiles of 32-bit words, so that only `Pages` can be copied, and reaches the
chip's main memory, no nearer one. Rows that a page does not hold yet are those of before, or staged ones.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import starts
from pallas_kernels.backend import pl, pltpu, tpu_call
from pallas_kernels.host import Blocks, Pages, on_host, unpack

__all__ = ["run"]

_UNDER_WAY = 16  # copies at once


def run(near, far, staged, idx, line, first, *, blocks: Blocks):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for rows that are not packed.
    """
    if not isinstance(far, Pages):
        raise NotImplementedError(f"a TPU copies pages, got {type(far).__name__}: pack rows by `as_pages`")
    (batch, n_heads, window, size), block = staged.shape, blocks.size
    slots, head = jnp.asarray(blocks.slots)[:, None], jnp.arange(n_heads)[:, None]
    lines = near.reshape(batch, -1, block, size)  # [B K·C P D]
    per_head, b = lines.shape[1] // n_heads, jnp.arange(batch)[:, None, None]
    named = (idx >= 0) & (line >= 0) & (idx * block < slots)
    page = jnp.where(named, starts(blocks.counts)[:-1, None] + idx, -1)
    to = jnp.where(named, head * per_head + line, lines.shape[1])
    rows = unpack(_copied(far.words, page), far.dtype, size)  # [B K N P D]
    slot = idx[..., None] * block + jnp.arange(block)  # [B K N P]
    there = (slot < jnp.minimum(first, slots[:, 0])[:, :, None, None])[..., None]
    rows = jnp.where(there, rows, lines.at[b, to].get(mode="clip"))
    near = lines.at[b, to].set(rows, mode="drop").reshape(near.shape)

    slot = first[..., None] + jnp.arange(window)  # [B K W]
    match = (idx[:, :, None] == (slot // block)[..., None]) & (line >= 0)[:, :, None]  # [B K W N]
    at = jnp.take_along_axis(line, jnp.argmax(match, -1), axis=2)
    alive = match.any(-1) & (slot < slots)
    to = jnp.where(alive, (head * per_head + at) * block + slot % block, near.shape[1])
    return near.at[b, to].set(staged, mode="drop")


def _copied(words, page):
    """Returns the pages [B K N U 256] that are named; where none is, anything."""
    batch, n_pages = len(page), page[0].size
    place = pl.BlockSpec(memory_space=pltpu.HBM)
    source = pl.BlockSpec(memory_space=pl.HOST) if on_host(words) else place
    out = tpu_call(
        _copy, page.reshape(batch, n_pages), words,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),  # an operand in host memory allows none
            in_specs=[source],
            out_specs=place,
            scratch_shapes=[pltpu.SemaphoreType.DMA((_UNDER_WAY,))],
        ),
        out_shape=pltpu.HBM((batch, n_pages, *words.shape[2:]), words.dtype),  # XLA would choose VMEM
        semantics=(), vmem_bytes=2**20, name="fetch_rows",
    )  # fmt: skip
    return out.reshape(*page.shape, *words.shape[2:])


def _copy(
    page_ref,  # [B N]
    words_ref,  # [B ΣN U 256] in HBM or pinned host memory
    out_ref,  # [B N U 256] in HBM
    sems,  # [16]
):
    """Copies all pages in turn, each when the copy that had its semaphore is done."""
    batch, n = page_ref.shape
    under_way = sems.shape[0]

    def on(i, act):
        b, at = jax.lax.div(i, n), jax.lax.rem(i, n)
        page = page_ref[b, at]

        @pl.when(page >= 0)
        def _():
            source, target = words_ref.at[b, page], out_ref.at[b, at]
            act(pltpu.make_async_copy(source, target, sems.at[jax.lax.rem(i, under_way)]))

    @pl.loop(0, batch * n + under_way)
    def _(i):
        @pl.when(i >= under_way)
        def _():
            on(i - under_way, lambda copy: copy.wait())

        @pl.when(i < batch * n)
        def _():
            on(i, lambda copy: copy.start())
