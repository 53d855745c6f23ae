"""What becomes of codewords, in Pallas Triton: thresholds of query heads, and marks; see `gpu`."""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.select_topk.gpu import LOWEST, bisect, ordered

__all__ = ["SURE", "marked"]

_CODES = 1024  # that a program marks
_HALVINGS, _DESCENTS = 12, 2
SURE = 30  # the bit of a codeword whose slots are taken; below it, one for each query head


def marked(table, counts, n, group: int, warps: int):
    """Returns what becomes of codewords' slots, [B K C] and [B K C/16], and the quotas [B K G]."""
    batch, n_heads, _, n_codes = table.shape
    per_query, per_code, per_word = (
        jax.ShapeDtypeStruct((batch, n_heads, x), jnp.int32) for x in (group, n_codes, pl.cdiv(n_codes, 16))
    )
    low, quota = gpu_call(
        _bound, table, counts, n, grid=(group, n_heads, batch), out_shape=(per_query, per_query),
        warps=warps, stages=1, name="vq_topk_bound",
    )  # fmt: skip
    marks, kinds = gpu_call(
        _mark, table, low, quota, grid=(pl.cdiv(n_codes, _CODES), n_heads, batch),
        out_shape=(per_code, per_word), stages=1, name="vq_topk_mark",
    )  # fmt: skip
    return marks, kinds, quota


def _bound(
    table_ref,  # [B K G C]
    counts_ref,  # [B K C]
    n_ref,  # [B]
    low_ref,  # [B K G] key of the threshold
    quota_ref,  # [B K G]
):
    """Bisects one query head's threshold."""
    g, head, row = program_id(0), program_id(1), program_id(2)
    n_codes = table_ref.shape[3]
    c = jnp.arange(pl.next_power_of_2(n_codes))
    count = triton.load(counts_ref.at[row, head, c], mask=c < n_codes, other=0)
    score = triton.load(table_ref.at[row, head, g, c], mask=c < n_codes, other=-jnp.inf)
    key = ordered(score)
    alive = jnp.sum(count, axis=0)
    wanted = jnp.minimum(n_ref[row], alive)
    total = lambda inside: jnp.sum(jnp.where(inside, count, 0), axis=0)  # noqa: E731  slots of codewords
    start = (jnp.int32(LOWEST), jnp.max(key, axis=0) + 1, alive)
    low, _ = bisect(lambda t: total(key >= t), _narrowed(score, key, total, start, wanted), wanted, wanted)
    low_ref[row, head, g] = low
    quota_ref[row, head, g] = wanted - total(key > low)


def _narrowed(score, key, total, start, wanted):
    """Returns a start for `bisect` that is mostly the threshold already, in half of the steps.

    Halving the range of the scores, and not that of their keys, soon leaves one codeword between; then
    the highest codeword below the upper end is the threshold.
    """
    finite = jnp.abs(score) < jnp.inf
    ends = (
        jnp.min(jnp.where(finite, score, jnp.inf), axis=0),
        jnp.max(jnp.where(finite, score, -jnp.inf), axis=0),
    )

    def halve(_, carry):
        low, high, ends, n = carry
        middle = ends[0] + 0.5 * (ends[1] - ends[0])
        at = ordered(middle)
        n_middle = total(key >= at)
        inside, enough = (at > low) & (at < high), n_middle >= wanted
        up, down = inside & enough, inside & ~enough
        ends = (jnp.where(enough, middle, ends[0]), jnp.where(enough, ends[1], middle))
        return jnp.where(up, at, low), jnp.where(down, at, high), ends, jnp.where(up, n_middle, n)

    low, high, _, n = jax.lax.fori_loop(0, _HALVINGS, halve, (*start[:2], ends, start[2]))

    def descend(_, carry):
        low, high, n = carry
        at = jnp.maximum(jnp.max(jnp.where(key < high, key, LOWEST), axis=0), low)
        n_at = total(key >= at)
        enough = n_at >= wanted
        return jnp.where(enough, at, low), jnp.where(enough, at + 1, at), jnp.where(enough, n_at, n)

    return jax.lax.fori_loop(0, _DESCENTS, descend, (low, high, n))


def _mark(
    table_ref,  # [B K G C]
    low_ref,  # [B K G]
    quota_ref,  # [B K G]
    marks_ref,  # [B K C]
    kinds_ref,  # [B K C/16]
):
    """Marks some codewords of one KV head."""
    head, row = program_id(1), program_id(2)
    group, n_codes = table_ref.shape[2:]
    c = program_id(0) * _CODES + jnp.arange(_CODES)
    sure, some = jnp.zeros((_CODES,), jnp.int32), jnp.zeros((_CODES,), jnp.int32)
    for g in range(group):
        key = ordered(triton.load(table_ref.at[row, head, g, c], mask=c < n_codes, other=-jnp.inf))
        low, taken = low_ref[row, head, g], (quota_ref[row, head, g] > 0).astype(jnp.int32)
        sure |= (key > low).astype(jnp.int32)
        some |= ((key == low).astype(jnp.int32) & taken) << g
    triton.store(marks_ref.at[row, head, c], sure << SURE | some, mask=c < n_codes)
    kind = sure | (some > 0).astype(jnp.int32) << 1
    words = jnp.sum(kind.reshape(_CODES // 16, 16) << (2 * jnp.arange(16))[None, :], axis=1)
    w = program_id(0) * (_CODES // 16) + jnp.arange(_CODES // 16)
    triton.store(kinds_ref.at[row, head, w], words, mask=w < kinds_ref.shape[2])
