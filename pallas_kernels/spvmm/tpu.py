"""spvmm in Pallas Mosaic: blocks of rows, of which those that the batch needs are read.

The list of such blocks drives the copies; steps beyond it name the last block again, which is not
copied again, and do nothing. A block is skipped only when all its rows are: single zeros at
random places save nothing here, zeros that lie together do.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import pl, pltpu, tpu_call
from pallas_kernels.sparse_matvec import block_order, cut, refuse

__all__ = ["Settings", "run"]

_LANES = 128
_SUBLANES = 8  # the batch is padded to them


@dataclass(frozen=True)
class Settings:
    """rows: of a block, a multiple of 128. block_bytes: of one buffer of weights, at most."""

    rows: int = 128
    block_bytes: int = 4 * 2**20


def run(x, w, level, scale):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    refuse(x, w, ("float32", "bfloat16"))
    (batch, n_rows), width, x = x.shape, w.shape[1], cut(x, level)
    key = {"dtype": w.dtype.name, "batch": batch, "rows": n_rows, "width": width}
    chosen = tuning.settings("spvmm", Settings(), **key)
    rows = chosen.rows
    most = max(_LANES, chosen.block_bytes // (rows * w.dtype.itemsize) // _LANES * _LANES)
    columns = min(width, most)
    order, n_needed = block_order(x, rows)
    padded = jnp.pad(x.astype(jnp.float32), ((0, _SUBLANES - batch), (0, -n_rows % rows)))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(pl.cdiv(width, columns), order.shape[0]),
        in_specs=[
            pl.BlockSpec((_SUBLANES, rows), lambda j, i, order, n: (0, _place(i, order, n))),
            pl.BlockSpec((rows, columns), lambda j, i, order, n: (_place(i, order, n), j)),
        ],
        out_specs=pl.BlockSpec((_SUBLANES, columns), lambda j, i, order, n: (0, j)),
    )
    out = tpu_call(
        functools.partial(_block, dtype=x.dtype), order, n_needed, padded, w,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((_SUBLANES, width), jnp.float32),
        semantics=("parallel", "arbitrary"),
        vmem_bytes=rows * columns * (2 * w.dtype.itemsize + 8) + 4 * 2**20,  # two buffers, two values
        name="spvmm",
    )[:batch]  # fmt: skip
    return (out if scale is None else out * scale).astype(x.dtype)


def _place(i, order, n):
    return order[jnp.minimum(i, jnp.maximum(n[0] - 1, 0))]


def _block(
    order_ref,  # [N] blocks, those needed first
    n_ref,  # [1] how many are needed
    x_ref,  # [8 P]
    w_ref,  # [P C]
    out_ref,  # [8 C]
    *,
    dtype: Any,
):
    """Adds the product of one block of rows."""
    i = pl.program_id(1)

    @pl.when(i == 0)
    def _clear():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(i < n_ref[0])
    def _add():
        x = x_ref[...]
        needed = jnp.max(jnp.where(x.T != 0, 1.0, 0.0), axis=1, keepdims=True) > 0  # [P 1]
        w = jnp.where(needed, w_ref[...].astype(jnp.float32), 0.0).astype(dtype)
        exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        out_ref[...] += jnp.dot(x.astype(dtype), w, precision=exact, preferred_element_type=jnp.float32)
