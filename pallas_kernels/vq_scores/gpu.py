"""Scores by codes in Pallas Triton: a kernel makes the table, another looks up.

The table [B K C X] is of the type of the scores and holds the X scores of a codeword side by side
(X pads G to a power of 2), so that a slot is one load of up to 16 bytes. A head's table (64 KiB
for 4 query heads and 4,096 codewords) fits L1, and there are about as many programs as
multiprocessors, so that each reads few tables from L2: with many, that is what binds. With
reduce="max", X is 1.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import float32_precision, gpu_call, pl, program_id, triton
from pallas_kernels.vq_scores.reference import ALWAYS

__all__ = ["Settings", "run", "tables"]

_TILE = 64  # codewords and, at most, queries of a program that makes a table
_WIDEST = 128  # query heads of a KV head


@dataclass(frozen=True)
class Settings:
    """programs: wanted in all. scores: of one store. batch: such stores whose loads go together."""

    programs: int = 264
    scores: int = 8192
    batch: int = 1
    warps: int = 16


def run(q, codebook, codes, *, reduce, dtype):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or sizes that the kernels do not take.
    """
    batch, n_heads, group, _ = q.shape
    table = tables(q, codebook, reduce, dtype)
    n_slots, out_group, width = codes.shape[2], 1 if reduce else group, table.shape[3]
    chosen = tuning.settings(
        "vq_scores", Settings(), dtype=dtype.name, group=out_group, codes=table.shape[2],
        slots=max(1, batch * n_slots),
    )  # fmt: skip
    span = max(16, pl.next_power_of_2(max(1, batch * n_heads * n_slots // chosen.programs)))
    span = min(span, max(16, pl.next_power_of_2(n_slots)))
    n = min(max(1, chosen.scores // width), span)
    out = gpu_call(
        functools.partial(_look_up, n=n, together=min(chosen.batch, span // n), span=span),
        codes, table,
        grid=(pl.cdiv(n_slots, span), n_heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, n_heads, out_group, n_slots), dtype),
        warps=chosen.warps, stages=1, name="vq_scores",
    )  # fmt: skip
    return out[:, :, 0] if reduce else out


def tables(q, codebook, reduce, dtype, *, by_query: bool = False):
    """Returns the scores of the codewords, [B K C X], or [B K G C] of each query head side by side.

    Raises:
        NotImplementedError: for types or sizes that the kernel does not take.
    """
    batch, n_heads, group, size = q.shape
    for name, x in (("q", q), ("codebook", codebook)):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"the kernel takes float32, bfloat16 and float16, got {name}.dtype={x.dtype}"
            )
    if size > 256 or group > _WIDEST:
        raise NotImplementedError(
            f"the kernel takes up to 256 channels and {_WIDEST} query heads per KV head, got D={size} and "
            f"G={group}: use the reference"
        )
    n_codes, width = codebook.shape[1], pl.next_power_of_2(group)
    queries = max(16, width, min(_TILE, pl.next_power_of_2(batch * width)))
    shape = (group, n_codes) if by_query else (n_codes, 1 if reduce else width)
    return gpu_call(
        functools.partial(_make_table, queries=queries, width=width, reduce=reduce, by_query=by_query),
        q, codebook,
        grid=(pl.cdiv(n_codes, _TILE), n_heads, pl.cdiv(batch * width, queries)),
        out_shape=jax.ShapeDtypeStruct((batch, n_heads, *shape), dtype),
        warps=4, stages=1, name="vq_scores_table",
    )  # fmt: skip


def _make_table(
    q_ref,  # [B K G D]
    codebook_ref,  # [K C D]
    table_ref,  # [B K C X], [B K C 1], or [B K G C]
    *,
    queries: int,
    width: int,  # X
    reduce: str | None,
    by_query: bool,
):
    """Makes the scores of one tile of a head's codewords for the queries of all batch rows."""
    head = program_id(1)
    batch, _, group, size = q_ref.shape
    n_codes, lanes = codebook_ref.shape[1], max(16, pl.next_power_of_2(size))
    dtype = jnp.promote_types(q_ref.dtype, codebook_ref.dtype)
    c, d = program_id(0) * _TILE + jnp.arange(_TILE), jnp.arange(lanes)
    row = program_id(2) * queries + jnp.arange(queries)
    at, g = row // width, row % width
    alive = (at < batch) & (g < group)
    mask = alive[:, None] & (d < size)[None, :]
    q = triton.load(q_ref.at[at[:, None], head, g[:, None], d[None, :]], mask=mask, other=0)
    mask = (c < n_codes)[:, None] & (d < size)[None, :]
    words = triton.load(codebook_ref.at[head, c[:, None], d[None, :]], mask=mask, other=0)
    scores = jnp.dot(
        words.astype(dtype), q.astype(dtype).T,
        precision=float32_precision() if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # [P, queries]  # fmt: skip
    if reduce:
        scores = jnp.where(alive[None, :], scores, -jnp.inf).reshape(_TILE, queries // width, width)
        scores = jnp.max(scores, axis=2)
        at, g = program_id(2) * (queries // width) + jnp.arange(queries // width), 0
        place, alive = table_ref.at[at[None, :], head, c[:, None], g], at < batch
    elif by_query:
        place = table_ref.at[at[None, :], head, g[None, :], c[:, None]]
    else:
        place = table_ref.at[at[None, :], head, c[:, None], g[None, :]]
    mask = (c < n_codes)[:, None] & alive[None, :]
    triton.store(place, scores.astype(table_ref.dtype), mask=mask)


def _look_up(
    codes_ref,  # [B K S]
    table_ref,  # [B K C X]
    out_ref,  # [B K G S]
    *,
    n: int,  # slots of one store
    together: int,
    span: int,
):
    """Looks up one span of one head's slots."""
    start, head, batch = program_id(0) * span, program_id(1), program_id(2)
    n_slots, (n_codes, width) = codes_ref.shape[2], table_ref.shape[2:]
    g = jnp.arange(width)

    def step(i, _):
        first = start + i * (together * n)
        slots = [first + j * n + jnp.arange(n) for j in range(together)]
        codes = [
            triton.load(codes_ref.at[batch, head, s], mask=s < n_slots, other=-1).astype(jnp.int32)
            for s in slots
        ]
        scores = []
        for code in codes:
            code = jnp.broadcast_to(code[:, None], (n, width))  # moved once; what follows is of its layout
            place = table_ref.at[batch, head, code, g[None, :]]
            score = triton.load(place, mask=(code >= 0) & (code < n_codes), other=-jnp.inf)
            scores.append(jnp.where(code == ALWAYS, jnp.asarray(jnp.inf, score.dtype), score))
        for s, score in zip(slots, scores, strict=True):
            mask = (s < n_slots)[:, None] & (g < out_ref.shape[2])[None, :]
            triton.store(out_ref.at[batch, head, g[None, :], s[:, None]], score, mask=mask)
        return 0

    jax.lax.fori_loop(0, span // (together * n), step, 0)
