"""spvmm_each in Pallas Triton: one launch, whose programs each have a tile of one of the matrices.

Alone, a small product is over before memory is busy.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import gpu_call, pl, program_id
from pallas_kernels.sparse_matvec import refuse, settings_key
from pallas_kernels.spvmm import gpu as one
from pallas_kernels.spvmm.gpu import Settings

__all__ = ["Settings", "run"]


def run(x, ws, levels, scales):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for batches and types that the kernel does not take.
    """
    if x.shape[0] > 1:
        return tuple(one.run(x, *each) for each in zip(ws, levels, scales, strict=True))
    for w in ws:
        refuse(x, w, ("float32", "bfloat16", "float16"))
    width = sum(w.shape[1] for w in ws)
    key = settings_key(x, jax.ShapeDtypeStruct((x.shape[1], width), ws[0].dtype))
    default = Settings(programs=528, warps=4 if ws[0].dtype == jnp.int8 else 8)  # codes take more registers
    chosen = tuning.settings("spvmm_each", default, **key)
    n_tiles = [pl.cdiv(w.shape[1], chosen.columns) for w in ws]
    sizes = one.sizes_of(chosen, x.shape, sum(n_tiles), ws[0].dtype.itemsize)
    shapes = [
        jax.ShapeDtypeStruct((sizes.spans, 1, w.shape[1]), x.dtype if sizes.spans == 1 else jnp.float32)
        for w in ws
    ]
    out = gpu_call(
        functools.partial(_each, first=(0, *itertools.accumulate(n_tiles)), sizes=sizes),
        x, levels, ws, scales,
        grid=(sum(n_tiles), sizes.spans),
        out_shape=shapes, warps=chosen.warps, name="spvmm_each",
    )  # fmt: skip
    return tuple(one.add_spans(part, x.dtype) for part in out)


def _each(
    x_ref,  # [1 F]
    level_refs,  # of each matrix: [], or None
    w_refs,  # [F M]
    scale_refs,  # [M], or None
    *out_refs,  # [I 1 M] a sum per span
    first: tuple[int, ...],  # tile of each, and how many there are
    sizes: one.Sizes,
):
    """Sums one tile of channels of one matrix over one span of rows."""
    tile, span = program_id(0), program_id(1)
    for i, (level, w, scale, out) in enumerate(zip(level_refs, w_refs, scale_refs, out_refs, strict=True)):

        @pl.when((tile >= first[i]) & (tile < first[i + 1]))
        def _own(i=i, refs=(x_ref, level, w, scale), out=out):
            one.sum_tile(refs, out, tile - first[i], span, sizes)
