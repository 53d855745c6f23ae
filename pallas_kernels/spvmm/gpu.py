"""spvmm in Pallas Triton: masked loads leave the rows that are not needed in memory.

A program sums a tile of output channels over a span of rows. It loads tiles of rows under a mask
per row: a masked lane makes no memory request, so traffic falls with the rows and no list of them
is made, which would cost a launch. With one span the kernel writes the output itself; partial sums
of several spans are added by XLA, which may fuse that into what follows.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.instructions import multiply_add
from pallas_kernels.sparse_matvec import cut, refuse, settings_key

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """columns: of a tile. loads: of 16 bytes that a thread has under way. programs: wanted in all."""

    columns: int = 128
    loads: int = 4
    programs: int = 640
    warps: int = 8


def run(x, w, level, scale):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    refuse(x, w, ("float32", "bfloat16", "float16"))
    (batch, n_rows), width = x.shape, w.shape[1]
    if batch > 1:
        default = Settings(loads=8, warps=4)
    else:
        default = Settings(warps=4 if w.dtype == jnp.int8 else 8)  # codes take more registers
    chosen = tuning.settings("spvmm", default, **settings_key(x, w))
    columns, loads = chosen.columns, chosen.loads
    rows = max(1, chosen.warps * 32 * (16 // w.dtype.itemsize) // columns)  # of one load
    if batch > 1:
        rows, loads = max(16, rows * loads), 1  # one tile, for the tensor cores
    n_tiles, n_steps = pl.cdiv(width, columns), pl.cdiv(n_rows, rows * loads)
    steps = pl.cdiv(n_steps, max(1, chosen.programs // n_tiles))  # of one span
    spans = pl.cdiv(n_steps, steps)
    sizes = {"rows": rows, "columns": columns, "steps": steps} | ({} if batch > 1 else {"loads": loads})
    part = jax.ShapeDtypeStruct((spans, batch, width), x.dtype if spans == 1 else jnp.float32)
    operands = (cut(x, level),) if batch > 1 else (x, level)
    out = gpu_call(
        functools.partial(_batch if batch > 1 else _one, **sizes),
        *operands, w, scale,
        grid=(n_tiles, spans),  # neighbouring tiles run together: they read the same pages of memory
        out_shape=part, warps=chosen.warps, name="spvmm",
    )  # fmt: skip
    return out[0] if spans == 1 else out.sum(axis=0).astype(x.dtype)


def _weights(w_ref, row, column, needed):
    """Loads a tile [P C] of the weights, without the rows not needed."""
    width, shape = w_ref.shape[1], (row.shape[0], column.shape[0])
    mask = jnp.broadcast_to(needed[:, None], shape)
    if width % shape[1]:
        mask = mask & (column < width)[None, :]
    return triton.load(w_ref.at[row[:, None], column[None, :]], mask=mask, other=0)


def _one(
    x_ref,  # [1 F]
    level_ref,  # [], or None
    w_ref,  # [F M]
    scale_ref,  # [M], or None
    out_ref,  # [I 1 M] a sum per span
    *,
    rows: int,  # P, of one load
    columns: int,  # C
    loads: int,
    steps: int,
):
    """Sums one tile of channels over one span of rows, for one batch row."""
    tile, span = program_id(0), program_id(1)
    n_rows, width = w_ref.shape
    column = tile * columns + jnp.arange(columns)
    level = None if level_ref is None else level_ref[...]

    def place(i, j):
        return ((span * steps + i) * loads + j) * rows + jnp.arange(rows)

    def inputs(i, j):
        row = place(i, j)
        return triton.load(x_ref.at[0, row], mask=(row < n_rows) & (i < steps), other=0)

    def needed(x):
        return x != 0 if level is None else (x != 0) & ~(jnp.abs(x.astype(jnp.float32)) < level)

    def step(i, carry):  # uses what the step before loaded, and loads for the next one in its place
        total, xs, ws = carry
        xs_after, ws_after = [inputs(i + 1, j) for j in range(loads)], []
        for j in range(loads):
            total = multiply_add(ws[j], xs[j].astype(jnp.float32)[:, None], total)
            ws_after.append(_weights(w_ref, place(i + 1, j), column, needed(xs_after[j])))
        return total, xs_after, ws_after

    total = jnp.zeros((rows, columns), jnp.float32)  # a thread's own
    xs = [inputs(0, j) for j in range(loads)]
    ws = [_weights(w_ref, place(0, j), column, needed(x)) for j, x in enumerate(xs)]
    total, *_ = jax.lax.fori_loop(0, steps, step, (total, xs, ws))
    total = jnp.sum(total, axis=0)
    if scale_ref is not None:
        total = total * triton.load(scale_ref.at[column], mask=column < width, other=0)
    triton.store(out_ref.at[span, 0, column], total.astype(out_ref.dtype), mask=column < width)


def _batch(
    x_ref,  # [B F]
    w_ref,  # [F M]
    scale_ref,  # [M], or None
    out_ref,  # [I B M] a sum per span
    *,
    rows: int,  # P
    columns: int,  # C
    steps: int,
):
    """Sums one tile of channels over one span of rows, for a batch padded to 16 for the tensor cores."""
    tile, span = program_id(0), program_id(1)
    batch, (n_rows, width), dtype = x_ref.shape[0], w_ref.shape, x_ref.dtype
    column, b = tile * columns + jnp.arange(columns), jnp.arange(16)
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def step(i, total):  # [16 C]
        row = (span * steps + i) * rows + jnp.arange(rows)
        each = [triton.load(x_ref.at[n, row], mask=row < n_rows, other=0) != 0 for n in range(batch)]
        needed = functools.reduce(jnp.logical_or, each)
        mask = (b < batch)[:, None] & (row < n_rows)[None, :]
        x = triton.load(x_ref.at[b[:, None], row[None, :]], mask=mask, other=0)
        w = _weights(w_ref, row, column, needed).astype(dtype)
        return total + jnp.dot(x, w, precision=exact, preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((16, columns), jnp.float32))
    if scale_ref is not None:
        total = total * triton.load(scale_ref.at[column], mask=column < width, other=0)[None, :]
    mask = (b < batch)[:, None] & (column < width)[None, :]
    out = total.astype(out_ref.dtype)
    triton.store(out_ref.at[span, b[:, None], column[None, :]], out, mask=mask)
