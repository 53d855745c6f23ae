"""Copies keys and values of chosen slots, which may lie in host memory, into lines on the device."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import Codes
from pallas_kernels.backend import debug_check
from pallas_kernels.fetch_rows import gpu, reference, tpu
from pallas_kernels.host import Blocks, Pages, on_host

__all__ = ["fetch_rows"]


def fetch_rows(
    near: tuple[Float[Array, "B Q D"], Float[Array, "B Q D"]],
    far: Any,
    staged: tuple[Float[Array, "B K W D"], Float[Array, "B K W D"]],
    idx: Int[Array, "B K N"],
    line: Int[Array, "B K N"],
    first: Int[Array, "B K"],
    *,
    blocks: Blocks,
    impl: str | None = None,
) -> tuple[Float[Array, "B Q D"], Float[Array, "B Q D"]]:
    """Returns `near` with line[b, k, n] of head k holding the rows of its block idx[b, k, n].

    Block i of a head is its slots i·P to i·P+P-1, and line l the rows l·P to l·P+P-1 of the head's Q/K.
    Slots from first[b, k] on are not in `far` yet: slot first + j is row j of `staged`. Rows beyond the
    head's capacity or the staged ones stay as they were.

    `far` may lie in pinned host memory, as for `sparse_decode_attention`; then the named rows cross the
    bus and no others. All else lies on the device. In `far` a slot's key and value lie side by side: what
    a place takes to cross is more the translation of its address than its bytes.

    Args:
        near: lines of keys and of values of all heads, one head after the other; donate them, and they are
            written in place.
        far: rows [B 2R D] of near's type, row 2r the key of packed row r and 2r + 1 its value; `pairs` of
            them as `Codes`; or, which alone a TPU's kernel takes, `Pages` of 2P of them. R = Σ slots.
        staged: the newest keys and values of each head.
        idx: blocks to copy, counted from the head's first slot; the first -1 ends a head's list.
        line: where to; -1 copies nothing. No line is named twice.
        first: the first slot that is staged.
        blocks: capacity of each KV head and slots per block, P; 1 copies single slots.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree, or anything but `far` in host memory; in debug mode for an
            index of no line, or blocks after a -1.
        NotImplementedError: for a type, head size or block without a kernel, where impl names one.

    Source: the host tier of A²ATS (arXiv 2502.12665) and LeoAM (arXiv 2506.20187).

    Cost: reads and writes 2·B·K·N·P·D elements at most, across the bus what is not staged.

    Example:
        >>> far, near = jnp.arange(12.0).reshape(1, 12, 1), (-jnp.ones((1, 3, 1)),) * 2
        >>> idx, line = jnp.asarray([[[4, 1]]]), jnp.asarray([[[0, 2]]])
        >>> staged, first = (jnp.full((1, 1, 2, 1), 99.0),) * 2, jnp.asarray([[4]])
        >>> k, v = fetch_rows(near, far, staged, idx, line, first, blocks=Blocks((6,)))
        >>> k[0, :, 0].tolist(), v[0, :, 0].tolist()
        ([99.0, -1.0, 2.0], [99.0, -1.0, 3.0])
    """
    _check_stores(near[0], far, blocks)
    slots, block, (batch, n_rows, size) = blocks.slots, blocks.size, near[0].shape
    heads = (batch, len(slots))
    if near[1].shape != near[0].shape or near[1].dtype != near[0].dtype:
        raise ValueError(f"keys and values have lines of one form, got {[(x.shape, x.dtype) for x in near]}")
    for x in staged:
        if x.shape[:2] + x.shape[3:] != (*heads, size) or x.dtype != near[0].dtype:
            raise ValueError(f"staged rows are [B K W D] of near's type, got {x.shape} {x.dtype}")
    if idx.shape != line.shape or idx.ndim != 3 or idx.shape[:2] != heads or first.shape != heads:
        raise ValueError(
            f"each head has a list of blocks, as many lines and a first staged slot, got {idx.shape=}, "
            f"{line.shape=} and {first.shape=}"
        )
    if on_host(near, staged, idx, line, first):
        raise ValueError("only far may lie in host memory: put the rest on the device")
    lines = n_rows // (len(slots) * block)
    debug_check(lambda: jnp.all((line >= -1) & (line < lines)), "a line is one of its head's, or -1 for none")
    alive = idx >= 0
    debug_check(lambda: jnp.all(alive[..., :-1] | ~alive[..., 1:]), "a -1 ends a head's list of blocks")
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    at = tuple(x.astype("int32") for x in (idx, line, first))
    return dispatch.run("fetch_rows", impl, impls, near, far, staged, *at, blocks=blocks)


def _check_stores(near: Any, far: Any, blocks: Blocks) -> None:
    """Raises ValueError where lines and far rows do not fit the blocks."""
    (batch, n_rows, size), pages = near.shape, isinstance(far, Pages)
    if pages and (far.block, far.head_dim, far.dtype) != (2 * blocks.size, size, near.dtype):
        raise ValueError(
            f"pages hold keys and values of blocks, got {far.block} rows of {far.head_dim} {far.dtype} for "
            f"{near.shape=}, {near.dtype} and {blocks=}"
        )
    rows = far.words if pages else far.codes if isinstance(far, Codes) else far
    n_rows_far = sum(blocks.slots) * (1 if isinstance(far, Codes) else 2)
    wanted = (batch, sum(blocks.counts)) if pages else (batch, n_rows_far, size)
    if rows.shape[: len(wanted)] != wanted or n_rows % (len(blocks.slots) * blocks.size):
        raise ValueError(
            f"near holds whole lines of every head and far two rows per slot, got {near.shape=} and "
            f"{rows.shape} for {blocks=}"
        )
    if isinstance(far, Codes) and (far.bits, far.block, far.codes.dtype) != (8, None, jnp.uint16):
        raise ValueError(
            f"codes are pairs of 8 bits, a scale per row, got {far.bits=}, {far.block=}, {far.codes.dtype}"
        )
