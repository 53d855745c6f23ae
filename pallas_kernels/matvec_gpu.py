"""What the products of one sparse row share in Pallas Triton: sums along rows of weights, one load ahead."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import pl, triton
from pallas_kernels.instructions import multiply_add

__all__ = ["row_sums", "tile_columns"]


def tile_columns(rows: int, warps: int, itemsize: int) -> int:
    """Returns the columns of a tile of so many rows of which each thread loads 16 bytes."""
    return max(16, warps * 32 * (16 // itemsize) // rows)


def row_sums(
    x_ref: Any, w_ref: Any, row: jax.Array, needed: jax.Array, columns: int, loads: int
) -> jax.Array:
    """Returns the products [P] of x_ref [1 M] with rows of weights [F M]; 0 for those not needed.

    columns: of one load. loads: that a thread has under way.
    """
    rows, width = row.shape[0], x_ref.shape[1]

    def place(i, j):
        return (i * loads + j) * columns + jnp.arange(columns)

    def inputs(i, j):  # as a tile: in the threads that need it
        column = jnp.broadcast_to(place(i, j)[None, :], (rows, columns))
        return triton.load(x_ref.at[0, column], mask=column < width, other=0).astype(jnp.float32)

    def tile(i, j):
        column = place(i, j)
        mask = needed[:, None] & (column < width)[None, :]
        return triton.load(w_ref.at[row[:, None], column[None, :]], mask=mask, other=0)

    def step(i, carry):  # uses what the step before loaded, and loads for the next one in its place
        total, ws = carry
        after = []
        for j in range(loads):
            total = multiply_add(ws[j], inputs(i, j), total)
            after.append(tile(i + 1, j))
        return total, after

    total = jnp.zeros((rows, columns), jnp.float32)  # a thread's own
    ws = [tile(0, j) for j in range(loads)]
    total, _ = jax.lax.fori_loop(0, pl.cdiv(width, columns * loads), step, (total, ws))
    return jnp.sum(total, axis=1)
