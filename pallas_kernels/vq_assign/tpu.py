"""The nearest codeword in Pallas Mosaic: codewords on sublanes, vectors on lanes.

So the least of a tile of codewords is taken from register to register, and codes leave in rows of
full lanes. The codeword tiles are the last axis of the grid; the least so far stays in scratch.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.backend import pl, pltpu, tpu_call

__all__ = ["run"]

_LANES = 128
_VECTORS, _CODEWORDS = 1024, 512


def run(x, codebook):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or head sizes that the kernel does not take.
    """
    dtype = jnp.promote_types(x.dtype, codebook.dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the kernel takes float32 and bfloat16, got {dtype}: cast x")
    if x.shape[3] > 512:
        raise NotImplementedError(f"the kernel takes head sizes up to 512, got D={x.shape[3]}")
    batch, n_heads, n_tokens, _ = x.shape
    if n_tokens >= _LANES:
        return _codes(x, codebook)
    rows = x.transpose(1, 0, 2, 3).reshape(1, n_heads, batch * n_tokens, -1)  # few: batch rows share lanes
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -batch * n_tokens % _LANES), (0, 0)))
    codes = _codes(rows, codebook)[:, :, : batch * n_tokens]
    return codes.reshape(n_heads, batch, n_tokens).transpose(1, 0, 2)


def _codes(x, codebook):
    batch, n_heads, n_tokens, size = x.shape
    n_codes = codebook.shape[1]
    tile, block = min(_VECTORS, n_tokens), min(_CODEWORDS, n_codes)
    held = tile * size * x.dtype.itemsize + block * size * codebook.dtype.itemsize
    out = tpu_call(
        functools.partial(_nearest, n_codes=n_codes),
        x, codebook,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(n_heads, batch, pl.cdiv(n_tokens, tile), pl.cdiv(n_codes, block)),
            in_specs=[
                pl.BlockSpec((None, None, tile, size), lambda k, b, t, c: (b, k, t, 0)),
                pl.BlockSpec((None, block, size), lambda k, b, t, c: (k, c, 0)),
            ],
            out_specs=pl.BlockSpec((None, None, 1, tile), lambda k, b, t, c: (b, k, 0, t)),
            scratch_shapes=[pltpu.VMEM((1, tile), jnp.float32), pltpu.VMEM((1, tile), jnp.int32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, n_heads, 1, n_tokens), jnp.int32),
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        vmem_bytes=4 * held + 8 * 4 * math.prod((tile, block)) + 2**21,
        name="vq_assign",
    )  # fmt: skip
    return out[:, :, 0].astype(jnp.int16)


def _nearest(
    x_ref,  # [X D]
    codebook_ref,  # [P D]
    code_ref,  # [1 X]
    least_ref,  # [1 X] scratch
    best_ref,  # [1 X] scratch
    *,
    n_codes: int,
):
    """Compares one tile of vectors with one tile of codewords."""
    place, block = pl.program_id(3), codebook_ref.shape[0]

    @pl.when(place == 0)
    def _():
        least_ref[...] = jnp.full_like(least_ref, jnp.inf)
        best_ref[...] = jnp.zeros_like(best_ref)

    dtype = jnp.promote_types(x_ref.dtype, codebook_ref.dtype)
    words = codebook_ref[...].astype(dtype)
    dots = jax.lax.dot_general(
        words, x_ref[...].astype(dtype), (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    half = 0.5 * jnp.sum(jnp.square(words.astype(jnp.float32)), axis=1, keepdims=True)
    code = place * block + jax.lax.broadcasted_iota(jnp.int32, dots.shape, 0)
    gap = jnp.where(code < n_codes, half - dots, jnp.inf)  # [P X]; past the end lie codewords of anything
    low = jnp.min(gap, axis=0, keepdims=True)
    first = jnp.min(jnp.where(gap == low, code, n_codes), axis=0, keepdims=True)
    nearer = low < least_ref[...]  # never where low is NaN
    least_ref[...] = jnp.where(nearer, low, least_ref[...])
    best_ref[...] = jnp.where(nearer, first, best_ref[...])

    @pl.when(place == pl.num_programs(3) - 1)
    def _():
        code_ref[...] = best_ref[...]
