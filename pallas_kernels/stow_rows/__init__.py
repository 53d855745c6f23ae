"""Writes the newest rows of a cache to where it lies, which may be host memory."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.host import Blocks, Pages, on_host
from pallas_kernels.stow_rows import gpu, reference

__all__ = ["stow_rows"]


def stow_rows(
    far: Any,
    staged: Shaped[Array, "B K W D"],
    first: Int[Array, "B K"],
    end: Int[Array, "B K"],
    *,
    slots: tuple[int, ...],
    impl: str | None = None,
) -> Any:
    """Returns `far` with slots first to end-1 of every head taken from its staged rows.

    Slot first + j becomes row j of `staged`; those beyond the head's capacity are dropped.

    `far` may lie in pinned host memory. Donate it to a program whose output has the sharding of far, and
    the rows are written in place. A loop cannot carry it: a kernel's outputs have the type of device
    memory.

    Args:
        far: the rows [B R D] of all heads, one head after the other, of any type, or `Pages`, of which whole
            blocks are read and written. R = Σ slots.
        staged: rows of the same type, on the device.
        first: the slot of the first staged row of each head.
        end: the slot after the last one, at most first + W.
        slots: capacity of each KV head.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs: XLA writes slices.

    Raises:
        ValueError: for shapes or types that disagree, or anything but `far` in host memory; in debug mode
            for more rows than are staged.
        NotImplementedError: for pages, and 2 to 4 GiB of bytes, where impl names a kernel.

    Source: the host tier of A²ATS (arXiv 2502.12665) and LeoAM (arXiv 2506.20187).

    Cost: reads and writes B·K·(end - first)·D elements, the latter across the bus.

    Example:
        >>> staged = jnp.asarray([[[[5.0], [6.0]]]])
        >>> first, end = jnp.asarray([[1]]), jnp.asarray([[3]])
        >>> stow_rows(jnp.zeros((1, 4, 1)), staged, first, end, slots=(4,))[0, :, 0]
        Array([0., 5., 6., 0.], dtype=float32)
    """
    batch, n_heads, window, size = staged.shape
    if isinstance(far, Pages):
        shape = (*far.words.shape[:2], far.head_dim)
        wanted = (batch, sum(Blocks(slots, far.block).counts), size)
    else:
        shape, wanted = far.shape, (batch, sum(slots), size)
    if shape != wanted or len(slots) != n_heads or far.dtype != staged.dtype:
        raise ValueError(
            f"far has a row per slot and staged rows are of its type, got {shape} {far.dtype} and "
            f"{staged.shape} {staged.dtype} for {slots=}"
        )
    if first.shape != (batch, n_heads) or end.shape != (batch, n_heads):
        raise ValueError(f"each head has a first and an end slot, got {first.shape=} and {end.shape=}")
    if on_host(staged, first, end):
        raise ValueError("only far may lie in host memory: put the rest on the device")
    debug_check(lambda: jnp.all(end - first <= window), "no more rows are written than are staged")
    impls = {"reference": reference.run, "gpu": gpu.run}
    at = tuple(x.astype("int32") for x in (first, end))
    return dispatch.run("stow_rows", impl, impls, far, staged, *at, slots=slots)
