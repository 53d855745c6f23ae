"""spvmm in Pallas Triton: masked loads leave the rows that are not needed in memory.

A program sums a tile of output channels over a span of rows. It loads tiles of rows under a mask
per row: a masked lane makes no memory request, so traffic falls with the rows and no list of them
is made, which would cost a launch. With one span the kernel writes the output itself; partial sums of
several spans are added by XLA, which may fuse that into what follows.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.sparse_matvec import refuse

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """tile: weights loaded at a time. columns: of them. programs: wanted in all, which sets the spans."""

    columns: int = 512
    tile: int = 16384
    programs: int = 528
    warps: int = 8


def run(x, w, scale):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    refuse(x, w, ("float32", "bfloat16", "float16"))
    (batch, n_rows), width = x.shape, w.shape[1]
    key = {"dtype": w.dtype.name, "batch": batch, "rows": n_rows, "width": width}
    chosen = tuning.settings("spvmm", Settings(), **key)
    columns, rows = chosen.columns, chosen.tile // chosen.columns
    n_tiles, n_steps = pl.cdiv(width, columns), pl.cdiv(n_rows, rows)
    steps = pl.cdiv(n_steps, max(1, chosen.programs // n_tiles))  # of one span
    spans = pl.cdiv(n_steps, steps)
    kernel = functools.partial(_span, rows=rows, columns=columns, steps=steps)
    part = jax.ShapeDtypeStruct((spans, batch, width), x.dtype if spans == 1 else jnp.float32)
    grid = (n_tiles, spans)  # neighbouring tiles run together: they read the same pages of memory
    out = gpu_call(kernel, x, w, scale, grid=grid, out_shape=part, warps=chosen.warps, name="spvmm")
    return out[0] if spans == 1 else out.sum(axis=0).astype(x.dtype)


def _span(
    x_ref,  # [B F]
    w_ref,  # [F M]
    scale_ref,  # [M], or None
    out_ref,  # [I B M] a sum per span
    *,
    rows: int,
    columns: int,
    steps: int,
):
    """Sums one tile of channels over one span of rows."""
    tile, span = program_id(0), program_id(1)
    (batch, n_rows), width, dtype = x_ref.shape, w_ref.shape[1], x_ref.dtype
    column, b = tile * columns + jnp.arange(columns), jnp.arange(16)
    here = column < width

    def weights(row, needed):
        mask = jnp.broadcast_to(needed[:, None], (rows, columns))
        if width % columns:
            mask = mask & here[None, :]
        return triton.load(w_ref.at[row[:, None], column[None, :]], mask=mask, other=0)

    def step_one(i, total):  # [P C]: each thread keeps its own sums
        row = (span * steps + i) * rows + jnp.arange(rows)
        x = triton.load(x_ref.at[0, row], mask=row < n_rows, other=0)
        return total + x.astype(jnp.float32)[:, None] * weights(row, x != 0).astype(jnp.float32)

    def step_batch(i, total):  # [X C]: the tensor cores take no fewer than 16 rows
        row = (span * steps + i) * rows + jnp.arange(rows)
        mask = (b < batch)[:, None] & (row < n_rows)[None, :]
        x = triton.load(x_ref.at[b[:, None], row[None, :]], mask=mask, other=0)
        needed = jnp.max(jnp.where(x != 0, 1, 0), axis=0) > 0
        w = weights(row, needed).astype(dtype)
        exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        return total + jnp.dot(x, w, precision=exact, preferred_element_type=jnp.float32)

    step, n = (step_one, rows) if batch == 1 else (step_batch, 16)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((n, columns), jnp.float32))
    scale = 1.0 if scale_ref is None else triton.load(scale_ref.at[column], mask=here, other=0)
    if batch == 1:
        out = (jnp.sum(total, axis=0) * scale).astype(out_ref.dtype)
        triton.store(out_ref.at[span, 0, column], out, mask=here)
    else:
        out = (total * (scale if scale_ref is None else scale[None, :])).astype(out_ref.dtype)
        mask = (b < batch)[:, None] & here[None, :]
        triton.store(out_ref.at[span, b[:, None], column[None, :]], out, mask=mask)
