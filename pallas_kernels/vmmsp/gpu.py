"""vmmsp in Pallas Triton: masked loads leave the rows that the gate shuts in memory.

A program computes a block of outputs. A masked lane makes no memory request, so traffic falls
with the rows, and one launch does all: mask, product and gate.
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
    """rows: of a program. tile: weights that it loads at a time."""

    rows: int = 16
    tile: int = 8192
    warps: int = 4


def run(x, gate, w_t, scale):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    refuse(x, w_t, ("float32", "bfloat16", "float16"))
    batch, (n_rows, width) = x.shape[0], w_t.shape
    key = {"dtype": w_t.dtype.name, "batch": batch, "rows": n_rows, "width": width}
    chosen = tuning.settings("vmmsp", Settings(), **key)
    kernel = functools.partial(_outputs, rows=chosen.rows, columns=chosen.tile // chosen.rows)
    return gpu_call(
        kernel, x, gate, w_t, scale,
        grid=(pl.cdiv(n_rows, chosen.rows),),
        out_shape=jax.ShapeDtypeStruct(gate.shape, gate.dtype),
        warps=chosen.warps, name="vmmsp",
    )  # fmt: skip


def _outputs(
    x_ref,  # [B M]
    gate_ref,  # [B F]
    w_ref,  # [F M]
    scale_ref,  # [F], or None
    out_ref,  # [B F]
    *,
    rows: int,
    columns: int,
):
    """Computes one block of outputs."""
    (batch, width), n_rows, dtype = x_ref.shape, w_ref.shape[0], x_ref.dtype
    row, b = program_id(0) * rows + jnp.arange(rows), jnp.arange(16)
    here = row < n_rows
    if batch == 1:
        gate = triton.load(gate_ref.at[0, row], mask=here, other=0)
        needed = gate != 0
    else:
        inside = (b < batch)[:, None] & here[None, :]
        gate = triton.load(gate_ref.at[b[:, None], row[None, :]], mask=inside, other=0)  # [X P]
        needed = jnp.max(jnp.where(gate != 0, 1, 0), axis=0) > 0

    def weights(column):
        mask = jnp.broadcast_to(needed[:, None], (rows, columns))
        if width % columns:
            mask = mask & (column < width)[None, :]
        return triton.load(w_ref.at[row[:, None], column[None, :]], mask=mask, other=0)

    def step_one(i, total):  # [P C]: each thread keeps its own sums
        column = i * columns + jnp.arange(columns)
        x = triton.load(x_ref.at[0, column], mask=column < width, other=0).astype(jnp.float32)
        return total + x[None, :] * weights(column).astype(jnp.float32)

    def step_batch(i, total):  # [X P]: the tensor cores take no fewer than 16 rows
        column = i * columns + jnp.arange(columns)
        mask = (b < batch)[:, None] & (column < width)[None, :]
        x = triton.load(x_ref.at[b[:, None], column[None, :]], mask=mask, other=0)
        exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        w = weights(column).astype(dtype)
        return total + jnp.dot(x, w.T, precision=exact, preferred_element_type=jnp.float32)

    step, shape = (step_one, (rows, columns)) if batch == 1 else (step_batch, (16, rows))
    total = jax.lax.fori_loop(0, pl.cdiv(width, columns), step, jnp.zeros(shape, jnp.float32))
    if batch == 1:
        total = jnp.sum(total, axis=1)
    if scale_ref is not None:
        scale = triton.load(scale_ref.at[row], mask=here, other=0)
        total = total * (scale if batch == 1 else scale[None, :])
    out = jnp.where(gate != 0, gate.astype(jnp.float32) * total, 0.0).astype(out_ref.dtype)
    if batch == 1:
        triton.store(out_ref.at[0, row], out, mask=here)
    else:
        triton.store(out_ref.at[b[:, None], row[None, :]], out, mask=inside)
