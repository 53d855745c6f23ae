"""Gives the blocks that a step reads lines of a cache on the device; those read longest ago make room."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import dispatch
from pallas_kernels.assign_lines import gpu, reference
from pallas_kernels.backend import debug_check
from pallas_kernels.host import Blocks

__all__ = ["assign_lines"]


def assign_lines(
    line: Int[Array, "B M"],
    held: Int[Array, "B K C"],
    used: Int[Array, "B K C"],
    idx: Int[Array, "B K N"],
    now: Int[Array, " B"],
    *,
    blocks: Blocks,
    impl: str | None = None,
) -> tuple[
    Int[Array, "B M"],
    Int[Array, "B K C"],
    Int[Array, "B K C"],
    Int[Array, "B K N"],
    Int[Array, "B K N"],
    Int[Array, "B K N"],
]:
    """Returns the three arrays after a step that reads blocks idx, the line of each, and what is new.

    A block that a line holds keeps it. The others, in their order, take the lines that were read longest
    ago, in the order of their numbers; of lines read at once the first go first, and none that this step
    reads. The last two results are the blocks that have got a line just now and their lines, and -1 after
    them: what `fetch_rows` copies. The first three are written in place, if they are donated.

    Args:
        line: the line of each block, all heads' one after the other, M = Σ blocks.counts; -1 is none.
        held: the block that each line holds; -1 is none. What `line` says the other way round.
        used: when each line was read last, -1 is never.
        idx: blocks that each head reads, equal ones next to each other, of 1 slot once; -1 is none.
        now: the time, above all of `used`.
        blocks: capacity of each KV head and slots per block.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs.

    Raises:
        ValueError: for shapes that disagree, or fewer lines than a step may read; in debug mode for a time
            that is not above the others.

    Source: least recently used, for the host tier of A²ATS (arXiv 2502.12665); the paper keeps nothing.

    Cost: reads `used` twice, and a few words for each of B·K·N.

    Example:
        >>> line, held = jnp.asarray([[0, -1, 1, -1]]), jnp.asarray([[[0, 2]]])
        >>> used, idx, now = jnp.asarray([[[3, 4]]]), jnp.asarray([[[2, 3]]]), jnp.asarray([5])
        >>> [x.tolist() for x in assign_lines(line, held, used, idx, now, blocks=Blocks((4,)))]
        [[[-1, -1, 1, 0]], [[[3, 2]]], [[[5, 5]]], [[[1, 0]]], [[[3, -1]]], [[[0, -1]]]]
    """
    heads, n_blocks = held.shape[:2], sum(blocks.counts)
    if line.shape != (held.shape[0], n_blocks) or len(blocks.slots) != heads[1] or used.shape != held.shape:
        raise ValueError(
            f"every block has a line and every line a block and a time, got {line.shape=}, {held.shape=} and "
            f"{used.shape=} for {blocks=}"
        )
    if idx.ndim != 3 or idx.shape[:2] != heads or now.shape != heads[:1]:
        raise ValueError(f"each head lists blocks and each row has a time, got {idx.shape=} and {now.shape=}")
    needed = min(idx.shape[2], max(blocks.counts))
    if needed > held.shape[2]:
        raise ValueError(
            f"lines hold what a step reads, got {needed} blocks for {held.shape[2]} lines: have more"
        )
    debug_check(lambda: jnp.all(used < now[:, None, None]), "time goes on from step to step")
    arrays = tuple(x.astype(jnp.int32) for x in (line, held, used, idx, now))
    impls = {"reference": reference.run, "gpu": gpu.run}
    return dispatch.run("assign_lines", impl, impls, *arrays, blocks=blocks)
