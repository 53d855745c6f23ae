"""Sparse decode attention in Pallas Triton: splits of the index list, then a join of the splits.

A program reads one split of one head's list. It computes the rows of a tile from the indices and
loads them by pointer, so that one tile holds blocks from anywhere, of any size. k and v are operands
as they came: in pinned host memory, the loads cross the bus and nothing else does.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention_gpu as shared
from pallas_kernels import tuning
from pallas_kernels.attention import AttentionForm, Codes, starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.host import on_host
from pallas_kernels.rows_gpu import load_rows, store_kind
from pallas_kernels.splits_gpu import join_splits

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """tile: slots per step of the loop. programs: wanted in all, which sets the split."""

    tile: int = 64
    programs: int = 1056
    warps: int = 4
    stages: int = 3


def run(q, k, v, mass, idx, *, form: AttentionForm, block: int):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or head sizes that the kernel does not take.
    """
    batch, n_heads, group, size = q.shape
    shared.check(q, k, v)
    n_slots = idx.shape[2] * block
    host = on_host(k, v)
    chosen = tuning.settings(
        "sparse_decode_attention",
        Settings(programs=2112) if host else Settings(),  # the bus wants more loads under way than HBM
        dtype=store_kind(k),
        memory="host" if host else "device",
        head_dim=size,
        group=group,
        block=block,
        rows=batch * n_heads * n_slots,
    )
    wanted = -(-batch * n_heads * n_slots // chosen.programs)
    split = -(-wanted // chosen.tile) * chosen.tile
    n_splits = -(-n_slots // split)
    places = [starts(form.slots)[:-1], np.asarray(form.slots)]
    for store in (k, v):
        per_block = store.block if isinstance(store, Codes) and store.block else max(form.slots)
        places.append(starts(tuple(-(-n // per_block) for n in form.slots))[:-1])
    parts = gpu_call(
        functools.partial(
            _split, form=form, factor=form.factor(size), block=block, tile=chosen.tile, split=split
        ),
        jnp.asarray(np.stack(places, axis=1), jnp.int32), idx, shared.part_queries(q, k), k, v, mass,
        grid=(batch, n_heads, n_splits),
        out_shape=shared.part_shapes(q, v, n_heads * n_splits),
        warps=chosen.warps, stages=chosen.stages, name="sparse_decode_attention",
    )  # fmt: skip
    out, lse = join_splits(parts, np.full(n_heads, n_splits), q, "sparse_decode_attention")
    return (out, lse) if form.lse else out


def _split(
    heads_ref,  # [K 4] first packed row, capacity, first block of scales of keys and of values
    idx_ref,  # [B K N]
    q_ref,  # [B K G E parts]
    k_ref,  # [B R E], or codes; in device or pinned host memory
    v_ref,  # [B R E], or codes; likewise
    mass_ref,  # [B R]
    *out_refs,  # of `part_shapes`
    form: AttentionForm,
    factor: float,
    block: int,  # P
    tile: int,
    split: int,
):
    """Attends over one split of one head's chosen blocks."""
    batch, head, item = program_id(0), program_id(1), program_id(2)
    first, size, *code_blocks = (heads_ref[head, i] for i in range(4))
    n_slots = idx_ref.shape[2] * block
    coded = shared.has_codes(k_ref, v_ref)
    q = shared.load_queries(q_ref, batch, head, coded)

    def blocks(at):
        return triton.load(
            idx_ref.at[batch, head, jax.lax.div(item * split + at, block)],
            mask=(at < split) & (item * split + at < n_slots),
            other=-1,
        )

    at = jnp.arange(pl.next_power_of_2(split))
    n = jnp.max(jnp.where(blocks(at) >= 0, at + 1, 0), axis=0)  # lists usually end in blocks of none

    def place(i):
        at = i * tile + jnp.arange(tile)
        chosen = blocks(at)
        slot = chosen * block + jax.lax.rem(item * split + at, block)
        alive = (chosen >= 0) & (slot < size)
        return jnp.where(alive, slot, 0), alive

    def rows(store, slot, code_block, alive):
        if isinstance(store, Codes) and store.block is not None:
            code_block = code_block + jax.lax.div(slot, store.block)
        return load_rows(store, (batch, first + slot, code_block), alive)

    def load_keys(i):
        slot, alive = place(i)
        mass = triton.load(mass_ref.at[batch, first + slot], mask=alive, other=0)
        return rows(k_ref, slot, code_blocks[0], alive), mass

    def load_values(i, mass):
        slot, alive = place(i)
        return rows(v_ref, slot, code_blocks[1], alive if isinstance(v_ref, Codes) else mass > 0)

    n_steps = (n + tile - 1) // tile
    load = load_keys, load_values
    state = shared.attend(n_steps, tile, load, (k_ref, v_ref), q, out_refs[0], form, factor)
    item = head * pl.num_programs(2) + item
    shared.store_split(state, batch, item, out_refs, coded)
