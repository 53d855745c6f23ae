"""add_norm in Pallas Triton: a program has a row, which it keeps in registers between the sum and the norm.

XLA makes three kernels of it: the norm waits for a reduction that waits for the sum.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import gpu_call, pl, program_id, triton

__all__ = ["run"]

_MOST = 16384  # columns: 32 of each of 512 threads


def run(x, y, scale, *, eps: float):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for rows that are too long.
    """
    batch, width = x.shape
    if width > _MOST:
        raise NotImplementedError(
            f"the kernel takes rows of {_MOST} at most, got {width}: let XLA compute it"
        )
    row = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return gpu_call(
        functools.partial(_row, eps=eps), x, y, scale,
        grid=(batch,), out_shape=(row, row), warps=16 if width > 2048 else 4, name="add_norm",
    )  # fmt: skip


def _row(
    x_ref,  # [B M]
    y_ref,  # [B M]
    scale_ref,  # [M]
    total_ref,  # [B M]
    out_ref,  # [B M]
    *,
    eps: float,
):
    """Adds and norms one row."""
    batch, width = program_id(0), x_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(width))
    inside = column < width
    x, y = (triton.load(ref.at[batch, column], mask=inside, other=0) for ref in (x_ref, y_ref))
    scale = triton.load(scale_ref.at[column], mask=inside, other=0)
    total = (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    norm = wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=0) / width + eps)
    triton.store(total_ref.at[batch, column], total, mask=inside)
    triton.store(out_ref.at[batch, column], (norm * scale).astype(out_ref.dtype), mask=inside)
