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
from pallas_kernels.matvec_gpu import row_sums, tile_columns
from pallas_kernels.sparse_matvec import refuse, settings_key

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """rows: of a program. loads: of 16 bytes that a thread has under way."""

    rows: int = 4
    loads: int = 4
    warps: int = 4


def run(x, gate, w_t, scale):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    refuse(x, w_t, ("float32", "bfloat16", "float16"))
    batch, n_rows = x.shape[0], w_t.shape[0]
    # A tile of a batch lies in shared memory in the type of x, of which an L4 has 99 KiB.
    default = (
        Settings() if batch == 1 else Settings(rows=16, loads=8 // (x.dtype.itemsize // w_t.dtype.itemsize))
    )
    chosen = tuning.settings("vmmsp", default, **settings_key(x, w_t))
    rows = chosen.rows if batch == 1 else max(16, chosen.rows)  # of the tensor cores
    columns = tile_columns(rows, chosen.warps, w_t.dtype.itemsize)
    return gpu_call(
        functools.partial(_one if batch == 1 else _batch, rows=rows, columns=columns, loads=chosen.loads),
        x, gate, w_t, scale,
        grid=(pl.cdiv(n_rows, rows),),
        out_shape=jax.ShapeDtypeStruct(gate.shape, gate.dtype),
        warps=chosen.warps, name="vmmsp",
    )  # fmt: skip


def _weights(w_ref, row, column, needed):
    """Loads a tile [P C] of the weights, without the rows not needed."""
    mask = needed[:, None] & (column < w_ref.shape[1])[None, :]
    return triton.load(w_ref.at[row[:, None], column[None, :]], mask=mask, other=0)


def _one(
    x_ref,  # [1 M]
    gate_ref,  # [1 F]
    w_ref,  # [F M]
    scale_ref,  # [F], or None
    out_ref,  # [1 F]
    *,
    rows: int,  # P
    columns: int,  # C, of one load
    loads: int,
):
    """Computes one block of outputs of one batch row."""
    row = program_id(0) * rows + jnp.arange(rows)
    here = row < w_ref.shape[0]
    gate = triton.load(gate_ref.at[0, row], mask=here, other=0)
    total = row_sums(x_ref, w_ref, row, gate != 0, columns, loads)
    if scale_ref is not None:
        total = total * triton.load(scale_ref.at[row], mask=here, other=0)
    out = jnp.where(gate != 0, gate.astype(jnp.float32) * total, 0.0)
    triton.store(out_ref.at[0, row], out.astype(out_ref.dtype), mask=here)


def _batch(
    x_ref,  # [B M]
    gate_ref,  # [B F]
    w_ref,  # [F M]
    scale_ref,  # [F], or None
    out_ref,  # [B F]
    *,
    rows: int,  # P
    columns: int,  # of one load
    loads: int,
):
    """Computes one block of outputs of a batch, which the tensor cores want padded to 16."""
    (batch, width), n_rows, dtype = x_ref.shape, w_ref.shape[0], x_ref.dtype
    row, b = program_id(0) * rows + jnp.arange(rows), jnp.arange(16)
    here = row < n_rows
    inside = (b < batch)[:, None] & here[None, :]
    gate = triton.load(gate_ref.at[b[:, None], row[None, :]], mask=inside, other=0)  # [16 P]
    needed = jnp.max(jnp.where(gate != 0, 1, 0), axis=0) > 0
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    columns = columns * loads

    def step(i, total):  # [16 P]
        column = i * columns + jnp.arange(columns)
        mask = (b < batch)[:, None] & (column < width)[None, :]
        x = triton.load(x_ref.at[b[:, None], column[None, :]], mask=mask, other=0)
        w = _weights(w_ref, row, column, needed).astype(dtype)
        return total + jnp.dot(x, w.T, precision=exact, preferred_element_type=jnp.float32)

    total = jnp.zeros((16, rows), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(width, columns), step, total)
    if scale_ref is not None:
        total = total * triton.load(scale_ref.at[row], mask=here, other=0)[None, :]
    out = jnp.where(gate != 0, gate.astype(jnp.float32) * total, 0.0).astype(out_ref.dtype)
    triton.store(out_ref.at[b[:, None], row[None, :]], out, mask=inside)
