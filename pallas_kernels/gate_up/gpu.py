"""gate_up in Pallas Triton: a program computes its channels' gates, and then up for those it leaves.

While some programs wait between the two, others read, so that memory is busy although rows are left
out here and there; apart, the sparse product would start and end alone.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.instructions import exp2
from pallas_kernels.matvec_gpu import row_sums, tile_columns
from pallas_kernels.sparse_matvec import refuse, settings_key

__all__ = ["Settings", "run"]

_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Settings:
    """rows: of a program. loads: of 16 bytes that a thread has under way."""

    rows: int = 1
    loads: int = 1
    warps: int = 8


def run(x, gate_t, up_t, level, weight, scales, *, act: str):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    refuse(x, gate_t, ("float32", "bfloat16", "float16"))
    batch, n_rows = x.shape[0], gate_t.shape[0]
    # A tile of a batch lies in shared memory in the type of x, of which an L4 has 99 KiB.
    loads = 8 // (x.dtype.itemsize // gate_t.dtype.itemsize)
    default = Settings() if batch == 1 else Settings(rows=16, loads=loads, warps=4)
    chosen = tuning.settings("gate_up", default, **settings_key(x, gate_t))
    rows = chosen.rows if batch == 1 else max(16, chosen.rows)  # of the tensor cores
    sizes = {"rows": rows, "columns": tile_columns(rows, chosen.warps, gate_t.dtype.itemsize)}
    return gpu_call(
        functools.partial(_one if batch == 1 else _batch, act=act, loads=chosen.loads, **sizes),
        x, gate_t, up_t, level, weight, scales,
        grid=(pl.cdiv(n_rows, rows),),
        out_shape=jax.ShapeDtypeStruct((batch, n_rows), x.dtype),
        warps=chosen.warps, name="gate_up",
    )  # fmt: skip


def _activate(x, act: str):
    """Returns act(x) of float32."""
    if act == "silu":
        return x / (1 + exp2(-x * _LOG2E))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * (1 - 1 / (1 + exp2(2 * inner * _LOG2E)))  # (1 + tanh y)/2 = 1 - 1/(1 + exp 2y)


def _alive(gate, row, here, level_ref, weight_ref):
    """Returns which gates are not below their level; weights are of the last axis, [P]."""
    score = jnp.abs(gate.astype(jnp.float32))
    if weight_ref is not None:
        weight = triton.load(weight_ref.at[row], mask=here, other=0)
        score = score * (weight if score.ndim == 1 else weight[None, :])
    return ~(score < level_ref[...])


def _scaled(total, ref, row, here):
    """Multiplies by the scales of rows, which lie along the last axis."""
    if ref is None:
        return total
    scale = triton.load(ref.at[row], mask=here, other=0)
    return total * (scale if total.ndim == 1 else scale[None, :])


def _one(
    x_ref,  # [1 M]
    gate_ref,  # [F M]
    up_ref,  # [F M]
    level_ref,  # []
    weight_ref,  # [F], or None
    scale_refs,  # two of [F], or None
    out_ref,  # [1 F]
    *,
    act: str,
    rows: int,  # P
    columns: int,  # C, of one load
    loads: int,
):
    """Computes one block of outputs of one batch row."""
    gate_scale, up_scale = scale_refs or (None, None)
    row = program_id(0) * rows + jnp.arange(rows)
    here = row < gate_ref.shape[0]
    gate = _scaled(row_sums(x_ref, gate_ref, row, here, columns, loads), gate_scale, row, here)
    gate = _activate(gate.astype(x_ref.dtype).astype(jnp.float32), act).astype(x_ref.dtype)
    needed = here & _alive(gate, row, here, level_ref, weight_ref) & (gate != 0)
    up = _scaled(row_sums(x_ref, up_ref, row, needed, columns, loads), up_scale, row, here)
    out = jnp.where(needed, gate.astype(jnp.float32) * up, 0.0)
    triton.store(out_ref.at[0, row], out.astype(out_ref.dtype), mask=here)


def _batch(
    x_ref,  # [B M]
    gate_ref,  # [F M]
    up_ref,  # [F M]
    level_ref,  # []
    weight_ref,  # [F], or None
    scale_refs,  # two of [F], or None
    out_ref,  # [B F]
    *,
    act: str,
    rows: int,  # P
    columns: int,  # of one load
    loads: int,
):
    """Computes one block of outputs of a batch, which the tensor cores want padded to 16."""
    (batch, width), n_rows, dtype = x_ref.shape, gate_ref.shape[0], x_ref.dtype
    gate_scale, up_scale = scale_refs or (None, None)
    row, b = program_id(0) * rows + jnp.arange(rows), jnp.arange(16)
    here = row < n_rows
    inside = (b < batch)[:, None] & here[None, :]
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    columns = columns * loads

    def product(w_ref, needed):  # [16 P]
        def step(i, total):
            column = i * columns + jnp.arange(columns)
            mask = (b < batch)[:, None] & (column < width)[None, :]
            x = triton.load(x_ref.at[b[:, None], column[None, :]], mask=mask, other=0)
            mask = needed[:, None] & (column < width)[None, :]
            w = triton.load(w_ref.at[row[:, None], column[None, :]], mask=mask, other=0).astype(dtype)
            return total + jnp.dot(x, w.T, precision=exact, preferred_element_type=jnp.float32)

        total = jnp.zeros((16, rows), jnp.float32)
        return jax.lax.fori_loop(0, pl.cdiv(width, columns), step, total)

    gate = _scaled(product(gate_ref, here), gate_scale, row, here).astype(dtype)
    gate = _activate(gate.astype(jnp.float32), act).astype(dtype)
    alive = inside & _alive(gate, row, here, level_ref, weight_ref) & (gate != 0)
    needed = jnp.max(alive.astype(jnp.int32), axis=0) > 0
    up = _scaled(product(up_ref, needed), up_scale, row, here)
    out = jnp.where(alive, gate.astype(jnp.float32) * up, 0.0).astype(out_ref.dtype)
    triton.store(out_ref.at[b[:, None], row[None, :]], out, mask=inside)
