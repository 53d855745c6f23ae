"""Sparse decode attention in Pallas Mosaic: blocks are fetched from HBM by index, two tiles in turn.

A step of the grid attends over one tile of one head's chosen blocks while the copies of the next
tile run, across heads too. So it goes where a block is a whole piece of memory: bfloat16 or float32
rows of a multiple of 128 channels, blocks of 16 or more slots (8 in float32), capacities of whole
blocks. Anything else, single slots among it, XLA gathers into dense rows for `decode_attention`.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.attention import AttentionForm, Codes, code_blocks, decode_codes, starts
from pallas_kernels.backend import pl, pltpu, tpu_call
from pallas_kernels.decode_attention import tpu as dense
from pallas_kernels.host import on_host

__all__ = ["Settings", "run"]

_LANES = 128
_LOWEST = -1e30  # below every logit, and finite: differences of two stay numbers
_LOG2E = 1.4426950408889634
_VMEM_LIMIT = 16 * 2**20  # what v4, v5e and v5p give a kernel by default; later ones give more
_SMEM_LIMIT = 2**20  # the least that a chip has


@dataclass(frozen=True)
class Settings:
    """tile: slots per step, a multiple of 128, unless a block is larger."""

    tile: int = 512


def run(q, k, v, mass, idx, *, form: AttentionForm, block: int):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for k or v in host memory, and what `decode_attention` does not take.
    """
    if on_host(k, v):
        raise NotImplementedError(
            "a kernel copies from host memory in pieces of 4 KiB, which blocks of rows are not; "
            "got k or v there: use impl='reference', which moves the chosen blocks, or the device"
        )
    if not _whole(q, k, v, idx, form, block):
        return _gathered(q, k, v, mass, idx, form, block)
    batch, n_heads, group, size = q.shape
    chosen = tuning.settings(
        "sparse_decode_attention",
        Settings(),
        dtype=str(k.dtype),
        head_dim=size,
        group=group,
        block=block,
        rows=batch * n_heads * idx.shape[2] * block,
    )
    per = max(1, min(chosen.tile, -(-idx.shape[2] * block // _LANES) * _LANES) // block)
    idx = jnp.where(idx * block < np.asarray(form.slots)[:, None], idx, -1)  # nothing is read beyond a head
    idx = jnp.pad(idx, ((0, 0), (0, 0), (0, -idx.shape[2] % per)), constant_values=-1)
    rows = jnp.where(idx < 0, -1, idx * block + starts(form.slots)[:-1, None])
    rows = rows.reshape(batch, 1, -1)
    stop = jnp.max(jnp.where(idx < 0, 0, jnp.arange(1, idx.shape[2] + 1)), axis=2)
    mass = jnp.pad(mass.astype(jnp.float32), ((0, 0), (0, -mass.shape[1] % _LANES)))

    def head(width):
        return pl.BlockSpec((1, 1, group, width), lambda b, head, *_: (b, head, 0, 0))

    lines = (1, mass.shape[1] // _LANES, _LANES)
    buffer = pltpu.VMEM((2, per * block, size), k.dtype)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, n_heads, idx.shape[2] // per),
        in_specs=[
            pl.BlockSpec((1, 1, rows.shape[2]), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM),
            head(size),
            pl.BlockSpec(lines, lambda b, *_: (b, 0, 0)),
            *[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        ],
        out_specs=[head(size), head(1)],
        scratch_shapes=[
            *(buffer, buffer, pltpu.SemaphoreType.DMA((2, 2))),
            *(pltpu.VMEM((group, n), jnp.float32) for n in (1, 1, size)),
        ],
    )
    out, lse = tpu_call(
        functools.partial(_kernel, form=form, factor=form.factor(size), block=block),
        stop.reshape(-1).astype(jnp.int32),
        rows, q, mass.reshape(batch, *lines[1:]), k, v,
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32),
        ],
        semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=_VMEM_LIMIT, name="sparse_decode_attention",
    )  # fmt: skip
    return (out, lse[..., 0]) if form.lse else out


def _whole(q, k, v, idx, form: AttentionForm, block: int) -> bool:
    """Returns whether blocks are whole pieces of memory, and lists and masses fit on the chip."""
    if isinstance(k, Codes) or isinstance(v, Codes) or not k.dtype == v.dtype == q.dtype:
        return False
    least = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float32): 8}.get(q.dtype)
    if least is None or block % least or (_LANES % block and block % _LANES):
        return False
    if q.shape[-1] % _LANES or any(n % block for n in form.slots):
        return False
    masses, lists = 4 * sum(form.slots), 4 * q.shape[1] * (idx.shape[2] + _LANES)
    tiles = 2 * max(Settings().tile, block) * q.shape[-1] * q.dtype.itemsize
    return 2 * (masses + tiles) <= 3 * _VMEM_LIMIT // 4 and 2 * lists <= 3 * _SMEM_LIMIT // 4


def _gathered(q, k, v, mass, idx, form: AttentionForm, block: int):
    """Gathers the chosen rows, and attends over them densely up to each list's last block."""
    size = jnp.asarray(form.slots)[:, None, None]
    slot = idx[..., None] * block + jnp.arange(block)  # [B K N P]
    alive = ((idx[..., None] >= 0) & (slot < size)).reshape(len(q), -1)
    row = starts(form.slots)[:-1, None, None] + jnp.clip(slot, 0, size - 1)
    row = row.reshape(len(q), -1)  # [B KNP]

    def rows(store):
        if not isinstance(store, Codes):
            return _take(store, row)
        at = row if store.block is None else jnp.asarray(code_blocks(form.slots, store.block))[row]
        scale, zero = _take(store.scale, at), _take(store.zero, at)
        return decode_codes(Codes(_take(store.codes, row), scale, zero, store.bits, None), ()).astype(q.dtype)

    mass = jnp.where(alive, _take(mass[..., None], row)[..., 0], 0.0)
    n = idx.shape[2]
    length = block * jnp.max(jnp.where(idx < 0, 0, jnp.arange(1, n + 1, dtype=jnp.int32)), axis=2)
    packed = dataclasses.replace(form, slots=(n * block,) * q.shape[1])
    return dense.run(q, rows(k), rows(v), mass, length, None, form=packed)


def _take(x, at):
    """Returns rows of x [B R E] at [B M]."""
    return jnp.take_along_axis(x, at[..., None], axis=1, mode="promise_in_bounds")


def _kernel(
    stop_ref,  # [B·K] blocks up to a list's last; in SMEM
    rows_ref,  # [1 1 K·N] first row of each chosen block, -1 for none; in SMEM
    q_ref,  # [1 1 G D]
    mass_ref,  # [1 R/128 128]
    k_ref,  # [B R D] in HBM
    v_ref,  # [B R D] in HBM
    out_ref,  # [1 1 G D]
    lse_ref,  # [1 1 G 1]
    k_tile_ref,  # [2 T D] tiles in turn
    v_tile_ref,  # [2 T D]
    done_ref,  # [2 2] semaphores of keys and of values, by turn
    top_ref,  # [G 1] largest logit, base 2
    total_ref,  # [G 1] sum of weights
    sum_ref,  # [G D] sum of weighted values
    *,
    form: AttentionForm,
    factor: float,
    block: int,  # P
):
    """Attends over one tile of one head's chosen blocks, while the next tile is fetched."""
    batch, head, step = (pl.program_id(axis) for axis in range(3))
    n_heads, n_steps = pl.num_programs(1), pl.num_programs(2)
    tile = k_tile_ref.shape[1]
    per = tile // block
    at = head * n_steps + step
    turn = jax.lax.rem(at, 2)

    def each_block(at, act):
        """Starts, or waits for, the copies of the blocks of one step of this batch row."""
        turn = jax.lax.rem(at, 2)

        def one(j, _):
            row = rows_ref[0, 0, at * per + j]

            @pl.when(row >= 0)
            def _():
                source = pl.ds(pl.multiple_of(row, block), block)
                target = pl.ds(pl.multiple_of(j * block, block), block)
                for i, (ref, tile_ref) in enumerate(((k_ref, k_tile_ref), (v_ref, v_tile_ref))):
                    act(
                        pltpu.make_async_copy(
                            ref.at[batch, source], tile_ref.at[turn, target], done_ref.at[i, turn]
                        )
                    )

            return 0

        jax.lax.fori_loop(0, per, one, 0)

    @pl.when(at == 0)
    def _():
        each_block(at, lambda copy: copy.start())

    @pl.when(at + 1 < n_heads * n_steps)
    def _():
        each_block(at + 1, lambda copy: copy.start())

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, _LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    each_block(at, lambda copy: copy.wait())

    @pl.when(step * per < stop_ref[batch * n_heads + head])
    def _():
        mass = _masses(mass_ref, [rows_ref[0, 0, at * per + j] for j in range(per)], block)  # [1 T]
        logit = _dot(q_ref[0, 0], k_tile_ref[turn], 1) * factor  # [G T]
        if form.softcap is not None:
            logit = form.softcap * jnp.tanh(logit / form.softcap)
        logit = jnp.where(mass > 0, logit * _LOG2E + jnp.log2(jnp.maximum(mass, 1e-30)), _LOWEST)
        top = jnp.maximum(top_ref[...], jnp.max(logit, axis=1, keepdims=True))
        p = jnp.where(mass > 0, jnp.exp2(logit - top), 0.0)
        old = jnp.exp2(top_ref[...] - top)
        alive = jnp.broadcast_to(mass, (8, tile)).T[:, :1] > 0  # [T 1]
        v = jnp.where(alive, v_tile_ref[turn].astype(jnp.float32), 0.0)  # a dead slot may hold NaN
        v = v.astype(v_ref.dtype)
        total_ref[...] = total_ref[...] * old + jnp.sum(p, axis=1, keepdims=True)
        sum_ref[...] = sum_ref[...] * old + _dot(p.astype(v.dtype), v, 0)
        top_ref[...] = top

    @pl.when(step == n_steps - 1)
    def _():
        total = total_ref[...]
        some = jnp.where(total > 0, total, 1.0)
        out_ref[0, 0] = jnp.where(total > 0, sum_ref[...] / some, 0.0).astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(total > 0, (top_ref[...] + jnp.log2(some)) / _LOG2E, -jnp.inf)


def _masses(mass_ref, rows: list, block: int):
    """Returns the masses [1 T] of blocks that begin at the given packed rows, 0 for a row of -1."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
    out = []
    for at in range(0, len(rows) * block, _LANES):
        line = jnp.zeros((1, _LANES), jnp.float32)
        for j in range(at // block, max(at // block + 1, (at + _LANES) // block)):
            row = jnp.maximum(rows[j], 0) + max(at - j * block, 0)
            found = mass_ref[0, pl.ds(jax.lax.div(row, _LANES), 1)]
            if block < _LANES:  # bring the block to its lanes
                found = pltpu.roll(
                    found, jax.lax.rem(j * block - at + _LANES - jax.lax.rem(row, _LANES), _LANES), 1
                )
            here = (lane >= j * block - at) & (lane < (j + 1) * block - at) & (rows[j] >= 0)
            line = jnp.where(here, found, line)
        out.append(line)
    return jnp.concatenate(out, axis=1)


def _dot(a, b, axis: int):
    """Returns the product over a's columns and an axis of b, in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )
