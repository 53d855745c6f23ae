"""Lines by gathers and scatters: the specification of the kernel."""

import jax.numpy as jnp

from pallas_kernels.attention import starts
from pallas_kernels.host import Blocks
from pallas_kernels.select_topk import select_topk

__all__ = ["look_up", "run"]


def run(line, held, used, idx, now, *, blocks: Blocks):
    """Returns line, held, used, the line of each block, the blocks that are new, and their lines."""
    n_heads, n_lines = held.shape[1:]
    row = starts(blocks.counts)[:-1, None]  # of each head in `line`
    known = look_up(line, idx, blocks)
    first = (idx >= 0) & (idx != jnp.pad(idx, ((0, 0), (0, 0), (1, 0)), constant_values=-1)[..., :-1])
    new = first & (known < 0)
    b, k = jnp.arange(len(idx))[:, None, None], jnp.arange(n_heads)[:, None]
    used = used.at[b, k, jnp.where(known >= 0, known, n_lines)].set(now[:, None, None], mode="drop")
    rank, count = jnp.maximum(jnp.cumsum(new, axis=-1) - 1, 0), new.sum(-1)
    oldest = _oldest(used, now, count, idx.shape[2])
    taken = jnp.take_along_axis(oldest, rank, axis=2)
    lost = jnp.where(new, jnp.take_along_axis(held, taken, axis=2), -1)
    line = line.at[b, jnp.where(lost >= 0, row + lost, line.shape[1])].set(-1, mode="drop")
    line = line.at[b, jnp.where(new, row + idx, line.shape[1])].set(taken, mode="drop")
    place = (b, k, jnp.where(new, taken, n_lines))
    held = held.at[place].set(idx, mode="drop")
    used = used.at[place].set(now[:, None, None], mode="drop")
    listed = jnp.full_like(idx, -1).at[b, k, jnp.where(new, rank, idx.shape[2])].set(idx, mode="drop")
    into = jnp.where(jnp.arange(idx.shape[2]) < count[..., None], oldest, -1)
    return line, held, used, look_up(line, idx, blocks), listed, into


def look_up(line, idx, blocks: Blocks):
    """Returns the line of each block [B K N], -1 for none."""
    at = starts(blocks.counts)[:-1, None] + jnp.maximum(idx, 0)
    found = jnp.take_along_axis(line, at.reshape(len(idx), -1), axis=1)
    return jnp.where(idx >= 0, found.reshape(idx.shape), -1)


def _oldest(used, now, n, most: int):
    """Returns the n [B K] lines that were read longest ago, ascending; `most` is room for them."""
    now = now[:, None, None]
    age = jnp.where(used == now, -jnp.inf, (now - used).astype(jnp.float32))
    # Those chosen beyond the n-th lie after the last line.
    beyond = jnp.where(jnp.arange(most) < most - n[..., None], jnp.inf, -jnp.inf)
    return jnp.maximum(select_topk(jnp.concatenate([age, beyond], axis=-1), most), 0)
