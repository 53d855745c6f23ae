"""rms_norm in Pallas Triton: a program holds a row in its registers."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import gpu_call, program_id, triton
from pallas_kernels.rows_gpu import lanes

__all__ = ["run"]

_MOST = 2**15  # channels: 128 numbers in each of 256 threads


def run(x, scale, *, eps: float):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for rows that are too long.
    """
    batch, width = x.shape
    if width > _MOST:
        raise NotImplementedError(f"the kernel takes rows of up to {_MOST} channels, got {width}")
    return gpu_call(
        functools.partial(_row, eps=eps), x, scale,
        grid=(batch,), out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), warps=8, name="rms_norm",
    )  # fmt: skip


def _row(
    x_ref,  # [B M]
    scale_ref,  # [M]
    out_ref,  # [B M]
    *,
    eps: float,
):
    """Normalises one row."""
    row, width = program_id(0), x_ref.shape[1]
    channel = jnp.arange(lanes(width))
    mask = channel < width
    x = triton.load(x_ref.at[row, channel], mask=mask, other=0).astype(jnp.float32)
    scale = triton.load(scale_ref.at[channel], mask=mask, other=0)
    x = x * jax.lax.rsqrt(jnp.sum(x * x) / width + eps) * scale
    triton.store(out_ref.at[row, channel], x.astype(out_ref.dtype), mask=mask)
