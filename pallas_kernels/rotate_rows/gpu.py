"""Rotations in Pallas Triton: a program turns a tile of rows, and keeps cosines and sines to itself."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.rows_gpu import load_halves, store_halves, turn

__all__ = ["run"]

_TILE = 16


def run(x, pos, frequencies, *, factor: float, back: bool):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {x.dtype=}")
    return gpu_call(
        functools.partial(_rotate, factor=factor, back=back),
        x, pos, frequencies,
        grid=(pl.cdiv(x.shape[1], _TILE), len(x)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), warps=4, name="rotate_rows",
    )  # fmt: skip


def _rotate(
    x_ref,  # [B R D]
    pos_ref,  # [B R]
    frequency_ref,  # [D/2]
    out_ref,  # [B R D]
    *,
    factor: float,
    back: bool,
):
    """Turns one tile of rows of one batch row."""
    batch = program_id(1)
    row = program_id(0) * _TILE + jnp.arange(_TILE)
    here = row < x_ref.shape[1]
    pair = [x.astype(jnp.float32) for x in load_halves(x_ref, batch, row, here)]
    pos = triton.load(pos_ref.at[batch, row], mask=here, other=0).astype(jnp.float32)
    pair = turn(pair, pos, frequency_ref, back)
    store_halves(out_ref, batch, row, [x / factor if back else x * factor for x in pair], here)
