"""Counts the blocks that cross the bus where the device keeps those read recently, of recorded steps.

For any number of lines at once, and by the rule of `tiers.bring`: the new blocks of a step take the place of
those that were read longest ago, of equals the lines of lowest number. A block whose slots are all still
staged, since the last program has not ended, crosses no bus.
"""

import numpy as np
from jaxtyping import Bool, Int

from experiments.selections import Steps

__all__ = ["asked_chunks", "lru_missed", "needed_lines", "tier_crossed", "tier_missed"]


def lru_missed(
    steps: Steps, block: int = 1, only: Bool[np.ndarray, "B K T N"] | None = None
) -> Int[np.ndarray, "T C"]:
    """Returns the blocks that cross in each step, in all, for 0, 1, ... lines of each head, up to all blocks.

    From step to step the lines keep the blocks that were read last, of those of one step the later ones. What
    n lines keep is part of what n + 1 keep, so one pass serves all.

    Args:
        block: slots that a line holds.
        only: the reads that count, None for all.
    """
    idx, n_blocks = steps.blocks(block), steps.n_blocks(block)
    order = np.arange(n_blocks)
    last = np.full((*idx.shape[:2], n_blocks), -1)  # step in which each block was read last
    missed = np.zeros((idx.shape[2], n_blocks + 1), np.int64)
    for t, first in enumerate(steps.first):
        now = idx[:, :, t]
        newest = np.argsort(-(last * n_blocks + order), axis=-1)
        more_recent = np.empty_like(newest)  # blocks read since each one
        np.put_along_axis(more_recent, newest, np.broadcast_to(order, newest.shape), axis=-1)
        more_recent[last < 0] = n_blocks
        crosses = (now >= 0) & (now * block < first)
        if only is not None:
            crosses &= only[:, :, t]
        distance = np.take_along_axis(more_recent, np.maximum(now, 0), axis=-1)[crosses]
        counts = np.bincount(distance, minlength=n_blocks + 1)
        missed[t] = np.cumsum(counts[::-1])[::-1]
        b, k, n = np.nonzero(now >= 0)
        last[b, k, now[b, k, n]] = t
    return missed


def needed_lines(steps: Steps, block: int = 1) -> int:
    """Returns the lines that `tiers.bring` wants for these lists, whatever is in them."""
    return min(steps.slot.shape[-1], steps.n_blocks(block))


def tier_missed(steps: Steps, block: int, lines: int) -> Int[np.ndarray, "B K T"]:
    """Returns how many blocks cross in each step; as, and raises as, `tier_crossed`."""
    return tier_crossed(steps, block, lines).sum(-1)


def asked_chunks(steps: Steps, block: int, crossed: Bool[np.ndarray, "B K T N"], chunk: int) -> Steps:
    """Returns what steps ask a disk for: the full chunks of the blocks that cross, each once.

    Those of all heads are numbered one after the other, as the slots of one head.

    Args:
        crossed: as of `tier_crossed`.
    """
    first = steps.first[:, None]
    number = steps.blocks(block) * block // chunk  # [B K T N]
    asked = crossed & ((number + 1) * chunk <= first)
    n_heads, n_chunks = number.shape[1], steps.n_blocks(chunk)
    number = np.where(asked, number + np.arange(n_heads)[:, None, None] * n_chunks, -1)
    number = np.sort(np.swapaxes(number, 1, 2).reshape(len(number), 1, len(first), -1))
    slot = Steps(number, steps.seen, steps.first, n_heads * n_chunks).blocks(1)
    return Steps(slot, steps.seen, np.full_like(steps.first, n_heads * n_chunks), n_heads * n_chunks)


def tier_crossed(steps: Steps, block: int, lines: int) -> Bool[np.ndarray, "B K T N"]:
    """Says which of `steps.blocks` cross in each step by the rule of `tiers.bring`.

    Raises:
        ValueError: for fewer lines than that takes.
    """
    if lines < (needed := needed_lines(steps, block)):
        raise ValueError(f"a tier has the lines that a step may read, {needed}, got ({lines=}): take more")
    idx = steps.blocks(block)
    heads, (n_steps, size) = idx.shape[:2], idx.shape[2:]
    idx = idx.reshape(-1, n_steps, size)
    row = np.arange(len(idx))[:, None]
    line = np.full((len(idx), steps.n_blocks(block)), -1)  # that holds each block
    held, used = (np.full((len(idx), lines), -1) for _ in range(2))
    crossed = np.zeros(idx.shape, bool)
    for t, first in enumerate(steps.first):
        if block > 1 and t and first > steps.first[t - 1]:
            _seal(line, held, used, steps.first[t - 1] // block)
        now = idx[:, t]
        known = np.where(now >= 0, line[row, now], -1)
        x, n = np.nonzero(known >= 0)
        used[x, known[x, n]] = t
        new = (now >= 0) & (known < 0)
        x, n = np.nonzero(new)
        victim = _oldest(used, t, new.sum(-1))[x, (np.cumsum(new, axis=-1) - 1)[x, n]]
        lost = held[x, victim]
        line[x[lost >= 0], lost[lost >= 0]] = -1
        line[x, now[x, n]], held[x, victim], used[x, victim] = victim, now[x, n], t
        crossed[:, t] = new & (now * block < first)
    return crossed.reshape(*heads, n_steps, size)


def _oldest(used: Int[np.ndarray, "K C"], t: int, n: Int[np.ndarray, " K"]) -> Int[np.ndarray, "K C"]:
    """Returns each head's n lines read longest ago, lowest numbers first."""
    lines = used.shape[1]
    oldest = np.argsort(np.where(used == t, t + 1, used), axis=-1, kind="stable")  # of equals the first
    return np.sort(np.where(np.arange(lines) < n[:, None], oldest, lines), axis=-1)


def _seal(line: np.ndarray, held: np.ndarray, used: np.ndarray, part: int) -> None:
    """Drops the blocks from `part` on: when they were copied, some of their rows were not yet written."""
    line[:, part:] = -1
    stale = held >= part
    held[stale], used[stale] = -1, -1
