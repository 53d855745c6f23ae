"""Keeps the rows of a layer in host memory, and on the device those that steps read.

A slot's key and value lie there side by side, so that they cross the bus together. A program never
writes to the host: it stages the rows of its new tokens on the device, and `flush` moves them between
programs. `bring` copies the blocks that a step reads into lines on the device, but for those that lie
there from earlier steps; attention reads lines alone, so what it computes does not depend on where rows
were. The lines that were read longest ago make room.

Source: A²ATS (arXiv 2502.12665) keeps K and V on the host; there the CPU attends. The lines are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax import disk, disk_rows
from kvjax.shapes import Leaf
from pallas_kernels import Codes, assign_lines, fetch_rows, stow_rows
from pallas_kernels.attention import encode, starts
from pallas_kernels.backend import debug_check, target
from pallas_kernels.host import Blocks, as_rows, empty_pages, pairs, unpaired

__all__ = [
    "STEPS", "Host", "Tier", "bring", "empty", "expect", "flush", "hit_rate", "resize", "stage", "whole",
]  # fmt: skip

STEPS = 64  # decode steps whose rows are staged before they are flushed


@dataclass(frozen=True)
class Host:
    """How a layer lies on the host.

    Args:
        lines: of each head on the device; at least what a step reads.
        block: slots that a line holds.
        bits: 8 stores codes with a scale per row, None the rows as they are.
        keep: whether lines outlive a step, so that the next one need not bring them again.
        remote: how rows lie on a disk, of which the host holds a part; None for all on the host.
    """

    lines: int
    block: int = 1
    bits: int | None = None
    keep: bool = True
    remote: disk.Remote | None = None


@struct.dataclass
class Tier:
    """A layer's rows on the host, and what the device holds of them: [K] heads of C lines of P slots."""

    far: Leaf  # [B 2R D] on the host, the key of each slot and its value; pairs, or pages, of them; or Remote
    k: Leaf  # [B Q D] lines of keys, Q = K·C·P
    v: Leaf  # [B Q D] lines of values
    new_k: Leaf  # [B K W D] staged keys
    new_v: Leaf  # [B K W D] staged values
    first: Leaf  # [B K] int32, slots that lie on the host; those from here on are staged
    line: Leaf  # [B ΣN] int32, the line that holds each block, -1 = none
    held: Leaf  # [B K C] int32, the block that each line holds, -1 = none
    used: Leaf  # [B K C] int32, tokens seen when the line was read last, -1 = never
    read: Leaf  # [B K] int32, blocks that steps read
    missed: Leaf  # [B K] int32, those of them that crossed the bus
    block: int = struct.field(pytree_node=False)  # slots per block, P
    keep: bool = struct.field(pytree_node=False)  # lines outlive a step


def empty(batch: int, slots: Sequence[int], head_dim: int, dtype: Any, how: Host) -> Tier:
    """Makes a layer that holds nothing.

    Raises:
        ValueError: for blocks that a TPU cannot copy.
        NotImplementedError: for codes on a TPU.
    """
    n_heads, n_blocks = len(slots), sum(Blocks(slots, how.block).counts)
    rows = lambda *shape: jnp.zeros((batch, *shape, head_dim), dtype)  # noqa: E731
    number = lambda value, *shape: jnp.full((batch, *shape), value, jnp.int32)  # noqa: E731
    return Tier(
        far=_place(batch, slots, head_dim, dtype, how),
        k=rows(n_heads * how.lines * how.block), v=rows(n_heads * how.lines * how.block),
        new_k=rows(n_heads, STEPS), new_v=rows(n_heads, STEPS), first=number(0, n_heads),
        line=number(-1, n_blocks), held=number(-1, n_heads, how.lines), used=number(-1, n_heads, how.lines),
        read=number(0, n_heads), missed=number(0, n_heads), block=how.block, keep=how.keep,
    )  # fmt: skip


def _both(slots: Sequence[int]) -> tuple[int, ...]:
    """Returns the rows of each head that are keys and values."""
    return tuple(2 * s for s in slots)


def _place(batch: int, slots: Sequence[int], head_dim: int, dtype: Any, how: Host) -> Any:
    """Makes keys and values in host memory; `pairs` of codes have their scales on the device."""
    if how.remote is not None:
        return how.remote
    host = jax.memory.Space.Host
    if target().platform == "tpu":
        if how.bits is not None:
            raise NotImplementedError(f"a TPU keeps rows on the host as they are, got {how.bits=}: take None")
        return jax.device_put(empty_pages(batch, Blocks(_both(slots), 2 * how.block), head_dim, dtype), host)
    n_rows = sum(slots)
    if how.bits is None:
        return jax.device_put(jnp.zeros((batch, 2 * n_rows, head_dim), dtype), host)
    words = jax.device_put(jnp.zeros((batch, n_rows, head_dim), jnp.uint16), host)
    return Codes(words, *(jnp.zeros((batch, n_rows, 2), dtype) for _ in range(2)), how.bits, None)


def stage(tier: Tier, slot: Int[Array, "B K T"], k: Array, v: Array) -> Tier:
    """Stages new rows [B K T D] for their slots; a slot below `first` takes none.

    Raises:
        ValueError: for more tokens than there is room; in debug mode for those of several programs.
    """
    room = tier.new_k.shape[2]
    if slot.shape[2] > room:
        raise ValueError(f"new tokens are staged before they are flushed, got {slot.shape[2]} for {room=}")
    at = slot - tier.first[..., None]
    debug_check(lambda: jnp.all(at < room), "staged rows overflow: flush them before more steps")
    at = jnp.where(at >= 0, at, room)
    b, n = (jnp.arange(n) for n in at.shape[:2])
    place = (b[:, None, None], n[:, None], at)
    return tier.replace(
        new_k=tier.new_k.at[place].set(k.astype(tier.new_k.dtype), mode="drop"),
        new_v=tier.new_v.at[place].set(v.astype(tier.new_v.dtype), mode="drop"),
    )


def bring(
    tier: Tier, idx: Int[Array, "B K N"], now: Int[Array, " B"], slots: tuple[int, ...]
) -> tuple[Tier, Int[Array, "B K N"]]:
    """Brings blocks into lines; returns the line of each.

    Args:
        idx: blocks of each head, equal ones next to each other; -1 is none.
        now: tokens seen, which grow from step to step.
        slots: capacity of each head.

    Raises:
        ValueError: for more blocks than lines.
    """
    blocks = Blocks(slots, tier.block)
    if not tier.keep:
        none = {name: jnp.full_like(getattr(tier, name), -1) for name in ("line", "held", "used")}
        tier = tier.replace(**none)
    line, held, used, place, *lists = assign_lines(tier.line, tier.held, tier.used, idx, now, blocks=blocks)
    most = min(idx.shape[2], max(blocks.counts))  # many tokens may name few blocks
    lists = [x[..., :most] for x in lists]
    asked = (idx >= 0) & (idx != jnp.pad(idx, ((0, 0), (0, 0), (1, 0)), constant_values=-1)[..., :-1])
    crossed = (lists[0] >= 0) & (lists[0] * tier.block < tier.first[..., None])
    if tier.block > 1:  # a block may have got rows since it was copied, which are staged
        there = jnp.take_along_axis(tier.held, jnp.maximum(place, 0), axis=2) == idx
        partly = (idx + 1) * tier.block > tier.first[..., None]
        lists = _listed(jnp.where(asked & (partly | ~there), idx, -1), place, most)
    if isinstance(tier.far, disk.Remote):
        k, v = disk_rows.into_lines(tier, *lists)
    else:
        staged = (tier.new_k, tier.new_v)
        k, v = fetch_rows((tier.k, tier.v), tier.far, staged, *lists, tier.first, blocks=blocks)
    tier = tier.replace(
        k=k,
        v=v,
        line=line,
        held=held,
        used=used,
        read=tier.read + asked.sum(-1, dtype=jnp.int32),
        missed=tier.missed + crossed.sum(-1, dtype=jnp.int32),
    )
    return tier, place


def expect(tier: Tier, idx: Int[Array, "B K N"] | None, slots: tuple[int, ...]) -> Float[Array, ""]:
    """Has blocks that no line holds read from the disk into host memory; -1 is none, None is all.

    Returns: 0, once reading has begun: what asks for the blocks is to depend on it.
    """
    if idx is None:
        return disk.expect(tier.far, None, tier.block)
    counts = Blocks(slots, tier.block).counts
    first = starts(counts)[:-1, None]
    line = tier.line[jnp.arange(len(idx))[:, None, None], jnp.maximum(idx, 0) + first]
    return disk.expect(tier.far, jnp.where((idx >= 0) & (line < 0), idx, -1), tier.block)


def _listed(copied: Int[Array, "B K N"], line: Int[Array, "B K N"], n: int) -> list[Array]:
    """Returns the blocks to copy, at most n, and their lines, before -1."""
    rank = jnp.where(copied >= 0, jnp.cumsum(copied >= 0, axis=2) - 1, n)
    b, k = jnp.arange(len(rank))[:, None, None], jnp.arange(rank.shape[1])[:, None]
    none = jnp.full((*rank.shape[:2], n), -1, jnp.int32)
    return [none.at[b, k, rank].set(x, mode="drop") for x in (copied, line)]


def whole(tier: Tier, slots: tuple[int, ...]) -> tuple[Float[Array, "B R D"], ...]:
    """Returns all keys and values on the device; for a prompt, which reads them once."""
    slot = tier.first[..., None] + jnp.arange(tier.new_k.shape[2])
    row = jnp.where(slot < jnp.asarray(slots)[:, None], starts(slots)[:-1, None] + slot, sum(slots))
    b, new = jnp.arange(len(slot))[:, None, None], (tier.new_k, tier.new_v)
    if isinstance(tier.far, disk.Remote):
        return tuple(
            x.at[b, row].set(y, mode="drop") for x, y in zip(disk_rows.every(tier, slots), new, strict=True)
        )
    # After this layer's rows are known, and not for all layers when the program begins.
    far, _ = jax.lax.optimization_barrier((tier.far, new))
    here = jax.device_put(far, jax.memory.Space.Device)
    here = as_rows(unpaired(here) if isinstance(here, Codes) else here, _both(slots)).astype(new[0].dtype)
    here = here.reshape(len(here), -1, 2, here.shape[2])
    return tuple(here[:, :, i].at[b, row].set(x, mode="drop") for i, x in enumerate(new))


def flush(tier: Tier, end: Int[Array, "B K"], slots: tuple[int, ...]) -> Tier:
    """Moves staged rows to the host.

    Args:
        end: slots in use of each head.
    """
    if not isinstance(tier.far, disk.Remote):
        tier = tier.replace(far=_written(tier, end, slots))
    return (tier if tier.block == 1 else _sealed(tier, slots)).replace(first=end)


def resize(tier: Tier, room: int) -> Tier:
    """Returns a tier that was flushed, with room to stage so many tokens."""
    batch, n_heads, now, size = tier.new_k.shape
    if now == room:
        return tier
    new_k, new_v = (jnp.zeros((batch, n_heads, room, size), tier.new_k.dtype) for _ in range(2))
    return tier.replace(new_k=new_k, new_v=new_v)


def _written(tier: Tier, end: Array, slots: tuple[int, ...]) -> Any:
    """Returns the host's rows with the staged ones."""
    far, new = tier.far, jnp.stack([tier.new_k, tier.new_v], axis=3)  # [B K W 2 D]
    new = new.reshape(*new.shape[:2], -1, new.shape[4])
    if not isinstance(far, Codes):
        return stow_rows(far, new, 2 * tier.first, 2 * end, slots=_both(slots))
    codes = pairs(Codes(*encode(new, far.bits, axis=-1), far.bits, far.block))
    return jax.tree.map(lambda x, y: stow_rows(x, y, tier.first, end, slots=slots), far, codes)


def _sealed(tier: Tier, slots: tuple[int, ...]) -> Tier:
    """Returns a tier without the blocks that were copied when only part of their rows was there."""
    part = tier.first // tier.block
    counts = Blocks(slots, tier.block).counts
    block = np.concatenate([np.arange(n) for n in counts])
    head = np.repeat(np.arange(len(slots)), counts)
    stale = tier.held >= part[..., None]
    return tier.replace(
        line=jnp.where(block >= part[:, head], -1, tier.line),
        held=jnp.where(stale, -1, tier.held),
        used=jnp.where(stale, -1, tier.used),
    )


def hit_rate(state: Sequence[Any]) -> float:
    """Returns the share of the blocks read that lay on the device, over layers with a tier; NaN for none."""
    tiers = [kv.tier for kv in state if kv.tier is not None]
    read, missed = (
        sum(np.asarray(getattr(t, name), np.float64).sum() for t in tiers) for name in ("read", "missed")
    )
    return 1 - missed / read if read else math.nan
