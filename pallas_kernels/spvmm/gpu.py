"""spvmm in Pallas Triton: masked loads leave the rows that are not needed in memory.

A program sums a tile of output channels over a span of rows. It loads tiles of rows under a mask
per row: a masked lane makes no memory request, so traffic falls with the rows and no list of them
is made, which would cost a launch. With one span the kernel writes the output itself; partial sums
of several spans are added by XLA, which may fuse that into what follows.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.instructions import multiply_add
from pallas_kernels.sparse_matvec import cut, refuse, settings_key

__all__ = ["Settings", "Sizes", "add_spans", "run", "sizes_of", "sum_tile"]


@dataclass(frozen=True)
class Settings:
    """columns: of a tile. loads: of 16 bytes that a thread has under way. programs: wanted in all."""

    columns: int = 128
    loads: int = 4
    programs: int = 640
    warps: int = 8


@dataclass(frozen=True)
class Sizes:
    """rows, columns: P and C of one load. loads: under way. steps: of a span. spans: in all, I."""

    rows: int
    columns: int
    loads: int
    steps: int
    spans: int


def sizes_of(chosen: Settings, shape: tuple[int, int], n_tiles: int, itemsize: int) -> Sizes:
    """Returns the sizes of programs for inputs [B F], and n_tiles of columns in all."""
    rows, loads = max(1, chosen.warps * 32 * (16 // itemsize) // chosen.columns), chosen.loads
    if shape[0] > 1:
        rows, loads = max(16, rows * loads), 1  # one tile, for the tensor cores
    n_steps = pl.cdiv(shape[1], rows * loads)
    steps = pl.cdiv(n_steps, max(1, chosen.programs // n_tiles))
    return Sizes(rows, chosen.columns, loads, steps, pl.cdiv(n_steps, steps))


def run(x, w, level, scale):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    refuse(x, w, ("float32", "bfloat16", "float16"))
    batch, width = x.shape[0], w.shape[1]
    if batch > 1:
        default = Settings(loads=8, warps=4)
    else:
        default = Settings(warps=4 if w.dtype == jnp.int8 else 8)  # codes take more registers
    chosen = tuning.settings("spvmm", default, **settings_key(x, w))
    n_tiles = pl.cdiv(width, chosen.columns)
    sizes = sizes_of(chosen, x.shape, n_tiles, w.dtype.itemsize)
    operands = (cut(x, level),) if batch > 1 else (x, level)
    part = jax.ShapeDtypeStruct((sizes.spans, batch, width), x.dtype if sizes.spans == 1 else jnp.float32)
    out = gpu_call(
        functools.partial(_batch if batch > 1 else _one, sizes=sizes),
        *operands, w, scale,
        grid=(n_tiles, sizes.spans),  # neighbouring tiles run together: they read the same pages of memory
        out_shape=part, warps=chosen.warps, name="spvmm",
    )  # fmt: skip
    return add_spans(out, x.dtype)


def add_spans(parts, dtype):
    """Returns the sum [B M] of what programs stored; XLA may fuse it into what follows."""
    return parts[0] if len(parts) == 1 else parts.sum(axis=0).astype(dtype)


def _weights(w_ref, row, column, needed):
    """Loads a tile [P C] of the weights, without the rows not needed."""
    width, shape = w_ref.shape[1], (row.shape[0], column.shape[0])
    mask = jnp.broadcast_to(needed[:, None], shape)
    if width % shape[1]:
        mask = mask & (column < width)[None, :]
    return triton.load(w_ref.at[row[:, None], column[None, :]], mask=mask, other=0)


def _one(
    x_ref,  # [1 F]
    level_ref,  # [], or None
    w_ref,  # [F M]
    scale_ref,  # [M], or None
    out_ref,  # [I 1 M] a sum per span
    *,
    sizes: Sizes,
):
    """Sums one tile of channels over one span of rows, for one batch row."""
    sum_tile((x_ref, level_ref, w_ref, scale_ref), out_ref, program_id(0), program_id(1), sizes)


def sum_tile(refs: tuple, out_ref, tile, span, sizes: Sizes) -> None:
    """Stores the sums of one tile of channels over one span of rows.

    refs: those of `_one`.
    """
    x_ref, level_ref, w_ref, scale_ref = refs
    rows, loads = sizes.rows, sizes.loads
    n_rows, width = w_ref.shape
    column = tile * sizes.columns + jnp.arange(sizes.columns)
    level = None if level_ref is None else level_ref[...]

    def place(i, j):
        return ((span * sizes.steps + i) * loads + j) * rows + jnp.arange(rows)

    def inputs(i, j):
        row = place(i, j)
        return triton.load(x_ref.at[0, row], mask=(row < n_rows) & (i < sizes.steps), other=0)

    def needed(x):
        return x != 0 if level is None else (x != 0) & ~(jnp.abs(x.astype(jnp.float32)) < level)

    def step(i, carry):  # uses what the step before loaded, and loads for the next one in its place
        total, xs, ws = carry
        xs_after, ws_after = [inputs(i + 1, j) for j in range(loads)], []
        for j in range(loads):
            total = multiply_add(ws[j], xs[j].astype(jnp.float32)[:, None], total)
            ws_after.append(_weights(w_ref, place(i + 1, j), column, needed(xs_after[j])))
        return total, xs_after, ws_after

    total = jnp.zeros((rows, sizes.columns), jnp.float32)  # a thread's own
    xs = [inputs(0, j) for j in range(loads)]
    ws = [_weights(w_ref, place(0, j), column, needed(x)) for j, x in enumerate(xs)]
    total, *_ = jax.lax.fori_loop(0, sizes.steps, step, (total, xs, ws))
    total = jnp.sum(total, axis=0)
    if scale_ref is not None:
        total = total * triton.load(scale_ref.at[column], mask=column < width, other=0)
    triton.store(out_ref.at[span, 0, column], total.astype(out_ref.dtype), mask=column < width)


def _batch(
    x_ref,  # [B F]
    w_ref,  # [F M]
    scale_ref,  # [M], or None
    out_ref,  # [I B M] a sum per span
    *,
    sizes: Sizes,
):
    """Sums one tile of channels over one span of rows, for a batch padded to 16 for the tensor cores."""
    tile, span = program_id(0), program_id(1)
    batch, (n_rows, width), dtype = x_ref.shape[0], w_ref.shape, x_ref.dtype
    rows, columns = sizes.rows, sizes.columns
    column, b = tile * columns + jnp.arange(columns), jnp.arange(16)
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def step(i, total):  # [16 C]
        row = (span * sizes.steps + i) * rows + jnp.arange(rows)
        each = [triton.load(x_ref.at[n, row], mask=row < n_rows, other=0) != 0 for n in range(batch)]
        needed = functools.reduce(jnp.logical_or, each)
        mask = (b < batch)[:, None] & (row < n_rows)[None, :]
        x = triton.load(x_ref.at[b[:, None], row[None, :]], mask=mask, other=0)
        w = _weights(w_ref, row, column, needed).astype(dtype)
        return total + jnp.dot(x, w, precision=exact, preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, sizes.steps, step, jnp.zeros((16, columns), jnp.float32))
    if scale_ref is not None:
        total = total * triton.load(scale_ref.at[column], mask=column < width, other=0)[None, :]
    mask = (b < batch)[:, None] & (column < width)[None, :]
    out = total.astype(out_ref.dtype)
    triton.store(out_ref.at[span, b[:, None], column[None, :]], out, mask=mask)
