"""vmmsp in Pallas Mosaic: blocks of rows, of which those that the gate lets through are read.

The list of such blocks drives the copies; steps beyond it name the last block again, which is not
copied again, and write zeros. A block is skipped only when all its rows are: single zeros at
random places save nothing here, zeros that lie together do.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import pl, pltpu, tpu_call
from pallas_kernels.sparse_matvec import block_order, refuse

__all__ = ["Settings", "run"]

_LANES = 128
_SUBLANES = 8  # the batch is padded to them


@dataclass(frozen=True)
class Settings:
    """rows: of a block, a multiple of 128. block_bytes: of one buffer of weights, at most."""

    rows: int = 128
    block_bytes: int = 4 * 2**20


def run(x, gate, w_t, scale):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    refuse(x, w_t, ("float32", "bfloat16"))
    batch, (n_rows, width) = x.shape[0], w_t.shape
    key = {"dtype": w_t.dtype.name, "batch": batch, "rows": n_rows, "width": width}
    chosen = tuning.settings("vmmsp", Settings(), **key)
    rows = chosen.rows
    columns = _columns(width, chosen.block_bytes // (rows * w_t.dtype.itemsize))
    n_parts = width // columns
    order, n_needed = block_order(gate, rows)
    factor = gate.astype(jnp.float32) if scale is None else gate.astype(jnp.float32) * scale
    factor = jnp.pad(factor, ((0, _SUBLANES - batch), (0, -n_rows % rows)))

    def part(i, j, order, n):  # beyond the list, the last part again
        return jnp.where(i < n[0], j, n_parts - 1)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(order.shape[0], n_parts),
        in_specs=[
            pl.BlockSpec((_SUBLANES, columns), lambda i, j, order, n: (0, part(i, j, order, n))),
            pl.BlockSpec((_SUBLANES, rows), lambda i, j, order, n: (0, order[i])),
            pl.BlockSpec(
                (rows, columns),
                lambda i, j, order, n: (
                    order[jnp.minimum(i, jnp.maximum(n[0] - 1, 0))],
                    part(i, j, order, n),
                ),
            ),
        ],
        out_specs=pl.BlockSpec((_SUBLANES, rows), lambda i, j, order, n: (0, order[i])),
    )
    out = tpu_call(
        _block, order, n_needed, jnp.pad(x, ((0, _SUBLANES - batch), (0, 0))), factor, w_t,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(factor.shape, jnp.float32),
        semantics=("parallel", "arbitrary"),
        vmem_bytes=rows * columns * (2 * w_t.dtype.itemsize + 4) + 4 * 2**20,  # two buffers, one value
        name="vmmsp",
    )  # fmt: skip
    return out[:batch, :n_rows].astype(gate.dtype)


def _columns(width: int, most: int) -> int:
    """Returns the largest multiple of 128 that divides the width and is within most, else the width."""
    fits = [c for c in range(_LANES, width, _LANES) if width % c == 0 and c <= most]
    return width if width <= most or not fits else fits[-1]


def _block(
    order_ref,  # [N] blocks, those needed first
    n_ref,  # [1] how many are needed
    x_ref,  # [8 C]
    factor_ref,  # [8 P] the gate, times the scale
    w_ref,  # [P C]
    out_ref,  # [8 P]
):
    """Adds one part of the channels of x to one block of outputs, and at the end applies the gate."""
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _clear():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(i < n_ref[0])
    def _add():
        dtype = x_ref.dtype
        exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        out_ref[...] += jax.lax.dot_general(
            x_ref[...], w_ref[...].astype(dtype), (((1,), (1,)), ((), ())),
            precision=exact, preferred_element_type=jnp.float32,
        )  # fmt: skip

        @pl.when(j == pl.num_programs(1) - 1)
        def _gate():
            factor = factor_ref[...]  # a row not needed may have summed NaN
            out_ref[...] = jnp.where(factor != 0, factor * out_ref[...], 0.0)
