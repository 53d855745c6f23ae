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
    (batch, n_heads, _, size), block = staged[0].shape, blocks.size
    slots, head = jnp.asarray(blocks.slots)[:, None], jnp.arange(n_heads)[:, None]
    n_lines = near[0].shape[1] // block  # of all heads, K·C
    per_head, b = n_lines // n_heads, jnp.arange(batch)[:, None, None]
    named = (idx >= 0) & (line >= 0) & (idx * block < slots)
    page = jnp.where(named, starts(blocks.counts)[:-1, None] + idx, -1)
    to = jnp.where(named, head * per_head + line, n_lines)
    rows = unpack(_copied(far.words, page), far.dtype, size).reshape(*page.shape, block, 2, size)
    slot = idx[..., None] * block + jnp.arange(block)  # [B K N P]
    there = (slot < jnp.minimum(first, slots[:, 0])[:, :, None, None])[..., None]

    def copied(x, i):
        lines = x.reshape(batch, n_lines, block, size)
        new = jnp.where(there, rows[..., i, :], lines.at[b, to].get(mode="clip"))
        return lines.at[b, to].set(new, mode="drop").reshape(x.shape)

    late = _late(staged[0].shape[2], idx, line, first, blocks)
    late = jnp.where(late >= 0, head * per_head * block + late, near[0].shape[1])
    near = (copied(x, i) for i, x in enumerate(near))
    return tuple(x.at[b, late].set(new, mode="drop") for x, new in zip(near, staged, strict=True))


def _late(window: int, idx, line, first, blocks: Blocks):
    """Returns where in its head's lines each staged row goes [B K W], -1 for nowhere."""
    slots, block = jnp.asarray(blocks.slots)[:, None], blocks.size
    slot = first[..., None] + jnp.arange(window)
    match = (idx[:, :, None] == (slot // block)[..., None]) & (line >= 0)[:, :, None]  # [B K W N]
    at = jnp.take_along_axis(line, jnp.argmax(match, -1), axis=2)
    alive = match.any(-1) & (slot < slots)
    return jnp.where(alive, at * block + slot % block, -1)


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
