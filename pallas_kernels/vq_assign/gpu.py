"""The nearest codeword in Pallas Triton: tiles of vectors against all codewords, tile after tile.

A program holds X vectors and walks over P codewords a time, keeping the least ½‖c‖² − x·c and its
code; the matrix products run on tensor cores, those of float32 as three. Vectors of all batch rows
share a head's codebook and so a tile: at decode, one token each, it is read once. Few vectors do not
fill the chip: then programs split the codewords, and a reduction joins them.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import float32_precision, gpu_call, pl, program_id, triton

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """vectors, codewords: of a tile at most. programs: wanted in all, at least."""

    vectors: int = 128
    codewords: int = 128
    programs: int = 264
    warps: int = 8
    stages: int = 2


def run(x, codebook):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or head sizes that the kernel does not take.
    """
    batch, n_heads, n_tokens, size = x.shape
    dtype = jnp.promote_types(x.dtype, codebook.dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {dtype}: cast x")
    if size > 256:
        raise NotImplementedError(f"the kernel takes head sizes up to 256, got D={size}: use the reference")
    n_codes, rows = codebook.shape[1], batch * n_tokens
    chosen = tuning.settings("vq_assign", _default(dtype, size), dtype=str(dtype), head_dim=size, rows=rows)
    tile = min(chosen.vectors, max(16, pl.next_power_of_2(rows)))
    block = min(chosen.codewords, max(16, pl.next_power_of_2(n_codes)))
    n_tiles, n_blocks = pl.cdiv(rows, tile), pl.cdiv(n_codes, block)
    blocks = pl.cdiv(n_blocks, pl.cdiv(chosen.programs, n_heads * n_tiles))  # per program
    splits = pl.cdiv(n_blocks, blocks)
    half = None  # with many vectors ½‖c‖² is made once, with few by the program, which waits for memory
    if splits == 1:
        half = 0.5 * jnp.sum(jnp.square(codebook.astype(jnp.float32)), axis=-1)
    part = (splits, batch, n_heads, n_tokens)
    gap, code = gpu_call(
        functools.partial(_nearest, tile=tile, block=block, n_blocks=blocks),
        x, codebook, half,
        grid=(n_tiles, splits, n_heads),
        out_shape=(jax.ShapeDtypeStruct(part, jnp.float32), jax.ShapeDtypeStruct(part, jnp.int16)),
        warps=chosen.warps, stages=chosen.stages, name="vq_assign",
    )  # fmt: skip
    if splits == 1:
        return code[0]
    return jax.lax.reduce((gap, code), (jnp.float32(jnp.inf), jnp.int16(2**15 - 1)), _first, (0,))[1]


def _default(dtype, size: int) -> Settings:
    """Returns tiles that fit registers, which hold all operands in float32, and shared memory."""
    if dtype == jnp.float32:
        return Settings(64, 64, warps=8) if size <= 128 else Settings(32, 32, warps=4)  # 96 KiB, on an L4 too
    return Settings() if size <= 128 else Settings(vectors=64, codewords=64, warps=4)


def _first(a, b):
    """Returns of two (gap, code) the lesser, in this order."""
    take = (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))
    return tuple(jnp.where(take, i, j) for i, j in zip(a, b, strict=True))


def _nearest(
    x_ref,  # [B K T D]
    codebook_ref,  # [K C D]
    half_ref,  # [K C] ½‖c‖², or None
    gap_ref,  # [N B K T] least ½‖c‖² − x·c
    code_ref,  # [N B K T]
    *,
    tile: int,  # X
    block: int,  # P
    n_blocks: int,  # of the split
):
    """Finds the nearest of one split's codewords for one tile of one head's vectors."""
    split, head = program_id(1), program_id(2)
    batch, _, n_tokens, size = x_ref.shape
    n_codes = codebook_ref.shape[1]
    dtype = jnp.promote_types(x_ref.dtype, codebook_ref.dtype)
    lanes = max(16, pl.next_power_of_2(size))
    exact = dtype == jnp.float32
    step_size = min(32, lanes) if exact else lanes  # operands of float32 are split in registers
    row = program_id(0) * tile + jnp.arange(tile)
    at, token, alive = row // n_tokens, row % n_tokens, row < batch * n_tokens

    def vectors(i):
        d = i * step_size + jnp.arange(step_size)
        mask = alive[:, None] & (d < size)[None, :]
        x = triton.load(x_ref.at[at[:, None], head, token[:, None], d[None, :]], mask=mask, other=0)
        return x.astype(dtype)

    def codewords(c, i):
        d = i * step_size + jnp.arange(step_size)
        mask = (c < n_codes)[:, None] & (d < size)[None, :]
        return triton.load(codebook_ref.at[head, c[:, None], d[None, :]], mask=mask, other=0).astype(dtype)

    steps = lanes // step_size
    whole = vectors(0) if steps == 1 else None

    def visit(i, carry):
        least, code = carry
        c = (split * n_blocks + i) * block + jnp.arange(block)
        dots, squares = jnp.zeros((tile, block), jnp.float32), jnp.zeros((block,), jnp.float32)
        for j in range(steps):
            x, words = (vectors(j) if whole is None else whole), codewords(c, j)
            dots += jnp.dot(
                x, words.T,
                precision=float32_precision() if exact else None, preferred_element_type=jnp.float32,
            )  # fmt: skip
            if half_ref is None:
                squares += jnp.sum(jnp.square(words.astype(jnp.float32)), axis=1)
        if half_ref is None:
            half = jnp.where(c < n_codes, 0.5 * squares, jnp.inf)
        else:
            half = triton.load(half_ref.at[head, c], mask=c < n_codes, other=jnp.inf)
        gap = half[None, :] - dots  # [X P]
        low = jnp.min(gap, axis=1)
        first = jnp.min(jnp.where(gap == low[:, None], c[None, :], n_codes), axis=1)
        nearer = low < least  # never where low is NaN
        return jnp.where(nearer, low, least), jnp.where(nearer, first, code)

    start = jnp.full((tile,), jnp.inf, jnp.float32), jnp.zeros((tile,), jnp.int32)
    least, code = jax.lax.fori_loop(0, n_blocks, visit, start)
    triton.store(gap_ref.at[split, at, head, token], least, mask=alive)
    triton.store(code_ref.at[split, at, head, token], code.astype(jnp.int16), mask=alive)
