"""Decode attention in Pallas Triton: splits of the slots, then a join of the splits.

Every program reads one split of one head's slots; splits of a layer are equal whatever the heads'
capacities, so ragged heads balance. Partial results [B I ...] are joined by a second kernel,
unless each head has one.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention_gpu as shared
from pallas_kernels import tuning
from pallas_kernels.attention import AttentionForm, Codes, starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.rows_gpu import load_rows, store_kind
from pallas_kernels.splits_gpu import join_splits

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """block: slots per step of the loop. programs: wanted in all, which sets the split."""

    block: int = 64
    programs: int = 1056
    warps: int = 4
    stages: int = 3


def run(q, k, v, mass, length, pos, *, form: AttentionForm):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types, head sizes or blocks of codes that the kernel does not take.
    """
    batch, n_heads, group, size = q.shape
    _check(q, k, v)
    coded = shared.has_codes(k, v)
    wide = q.dtype.itemsize * size > 512  # bytes of a row: three tiles of 64 such rows are too much for an L4
    small = Settings(block=32, warps=1, stages=2) if coded else Settings(block=32, stages=2)
    chosen = tuning.settings(
        "decode_attention",
        small if coded or wide else Settings(),
        dtype=store_kind(k),
        head_dim=size,
        group=group,
        rows=batch * sum(form.slots),
    )
    unit = _unit(k, v)
    block = max(chosen.block, unit)
    split = max(block, -(-batch * sum(form.slots) // chosen.programs // block) * block)
    items = _items(form.slots, split, unit)
    warps = max(chosen.warps, _least_warps(block, q) if coded else 1)
    parts = gpu_call(
        functools.partial(_split, form=form, block=block, unit=unit, factor=form.factor(size)),
        jnp.asarray(items), length, pos, shared.part_queries(q, k), k, v, mass,
        grid=(batch, len(items)),
        out_shape=shared.part_shapes(q, v, len(items)),
        warps=warps, stages=chosen.stages, name="decode_attention",
    )  # fmt: skip
    counts = np.bincount(items[:, 0], minlength=n_heads)
    out, lse = join_splits(parts, counts, q, "decode_attention")
    return (out, lse) if form.lse else out


def _least_warps(block: int, q: Any) -> int:
    """Returns how many warps have the registers for a tile of codes.

    One has those for 32 rows of 128 channels in 16 bits, and for the sums of eight queries.
    """
    _, _, group, size = q.shape
    tile_bytes = block * pl.next_power_of_2(size) * q.dtype.itemsize
    return max(tile_bytes // 2**13, pl.next_power_of_2(group) // 8)


def _check(q, k, v) -> None:
    shared.check(q, k, v)
    for store in (k, v):
        block = store.block or 32 if isinstance(store, Codes) else 32
        if block not in (16, 32, 64, 128):
            raise NotImplementedError(
                f"the kernel takes codes in blocks of 16 to 128, a power of 2, got {block=}"
            )
    if all(isinstance(s, Codes) and s.block for s in (k, v)) and k.block != v.block:
        raise NotImplementedError(f"keys and values share their block, got {k.block} and {v.block}")


def _unit(*stores: Any) -> int:
    """Returns how many slots share scales; 1 where none do."""
    return max(s.block if isinstance(s, Codes) and s.block else 1 for s in stores)


def _items(slots: tuple[int, ...], split: int, unit: int) -> np.ndarray:
    """Returns the work [I 6]: head, first slot, its packed row, its block of scales, slots; the last row."""
    first, first_block = starts(slots), starts(tuple(-(-size // unit) for size in slots))
    return np.array(
        [
            (head, at, first[head] + at, first_block[head] + at // unit, min(split, size - at), last)
            for head, (size, last) in enumerate(zip(slots, first[1:] - 1, strict=True))
            for at in range(0, size, split)
        ],
        np.int32,
    )


def _split(
    items_ref,  # [I 6] head, first slot, its row, its block of scales, slots, the head's last row
    length_ref,  # [B K]
    pos_ref,  # [B], or None
    q_ref,  # [B K G E parts]
    k_ref,  # [B R E], or codes
    v_ref,  # [B R E], or codes
    mass_ref,  # [B R]
    *out_refs,  # of `part_shapes`
    form: AttentionForm,
    block: int,  # P
    unit: int,
    factor: float,
):
    """Attends over one split of one head's slots."""
    batch, item = program_id(0), program_id(1)
    head, first, row, code_block = (items_ref[item, i] for i in range(4))
    coded = shared.has_codes(k_ref, v_ref)
    q = shared.load_queries(q_ref, batch, head, coded)
    length = length_ref[batch, head]
    if form.holes:
        length = jnp.where(mass_ref[batch, items_ref[item, 5]] > 0, mass_ref.shape[1], length)
    if pos_ref is not None:
        length = jnp.where(pos_ref[batch] >= 0, length, 0)
    n = jnp.clip(length - first, 0, items_ref[item, 4])

    def place(i):
        at = i * block + jnp.arange(block)
        # Codes beyond the end are loaded too: those of the last row.
        inside = jnp.minimum(at, jnp.maximum(n - 1, 0)) if coded else at
        return (batch, row + inside, code_block + i * (block // unit)), at < n

    def load_keys(i):
        where, alive = place(i)
        mass = triton.load(mass_ref.at[where[:2]], mask=alive, other=0)
        return load_rows(k_ref, where, shared.needed(k_ref, alive)), mass

    def load_values(i, mass):
        return load_rows(v_ref, place(i)[0], shared.needed(v_ref, mass > 0))

    n_steps = (n + block - 1) // block
    load = load_keys, load_values
    state = shared.attend(n_steps, block, load, (k_ref, v_ref), q, out_refs[0], form, factor)
    shared.store_split(state, batch, item, out_refs, coded)
