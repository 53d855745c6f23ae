"""Row writes in Pallas Triton: a program writes a tile of one head's rows, in place, across the bus too."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.host import Pages, on_host
from pallas_kernels.rows_gpu import lanes

__all__ = ["run"]

_TILE = 32


def run(far, staged, first, end, *, slots: tuple[int, ...]):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for pages.
    """
    if isinstance(far, Pages):
        raise NotImplementedError("pages are a TPU's, which writes them by XLA: give rows")
    batch, n_heads, window, _ = staged.shape
    heads = jnp.asarray(np.stack([starts(slots)[:-1], slots], axis=1), jnp.int32)
    out = gpu_call(
        _write, far, staged, first, end, heads,
        grid=(batch, n_heads, pl.cdiv(window, _TILE)),
        out_shape=jax.ShapeDtypeStruct(far.shape, far.dtype), aliases={0: 0}, name="stow_rows",
    )  # fmt: skip
    # A kernel's outputs have the type of device memory; this is where it lies already, and moves nothing.
    return jax.device_put(out, jax.memory.Space.Host) if on_host(far) else out


def _write(
    _,  # [B R D] far, which is out
    staged_ref,  # [B K W D]
    first_ref,  # [B K]
    end_ref,  # [B K]
    heads_ref,  # [K 2] first packed row and capacity
    out_ref,  # [B R D]; in device or pinned host memory
):
    """Writes one tile of one head's staged rows."""
    batch, head = program_id(0), program_id(1)
    at = program_id(2) * _TILE + jnp.arange(_TILE)
    slot = first_ref[batch, head] + at
    alive = (slot < jnp.minimum(end_ref[batch, head], heads_ref[head, 1])) & (at < staged_ref.shape[2])
    channel = jnp.arange(lanes(out_ref.shape[2]))
    mask = alive[:, None] & (channel < out_ref.shape[2])[None, :]
    rows = triton.load(staged_ref.at[batch, head, at[:, None], channel[None, :]], mask=mask, other=0)
    # Interpreted, what is masked is written back as it was, over what others wrote: not inside, then.
    to = jnp.where(alive, heads_ref[head, 0] + slot, out_ref.shape[1])
    triton.store(out_ref.at[batch, to[:, None], channel[None, :]], rows, mask=mask)
