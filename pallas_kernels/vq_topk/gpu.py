"""Slots chosen by their codes in Pallas Triton: look for thresholds among codewords, then read codes.

Scores of slots are never written:

    table   the scores of all codewords, of `vq_scores`
    bound   one program per query head bisects its threshold, where the codewords above stand for at most
            n slots, and says how many slots at the threshold it takes
    mark    says of each codeword whether its slots are taken: surely, or of which heads the first few;
            and, in two bits, the former, and whether there is any of the latter
    ties    every part of every KV head counts the slots of which the first few are taken
    keep    every part writes the slots that it takes, in order, and how many
    gather  every part copies its own behind those before it

Where KV heads are many, each is one part, and `keep` is all of the last three.

Codes come from anywhere, so that a slot's look-up costs a line of the cache: two bits a codeword are few
lines. Scores are compared as integer keys in float32's total order, as in `select_topk`. Arrays in Triton
have sizes of powers of two: C2, T2 and X pad codewords, parts and, in the table, query heads.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.vq_scores.gpu import tables
from pallas_kernels.vq_topk.marks_gpu import SURE, marked

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """programs: wanted in all. block: slots of one step, at most 2^15. warps: of a part, and of a bound."""

    programs: int = 528
    block: int = 4096
    warps: int = 8
    bound_warps: int = 4


def run(q, codebook, codes, counts, n, *, k: int, n_always: int):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or sizes that the kernels do not take.
    """
    batch, n_heads, group, _ = q.shape
    n_codes, n_slots = codebook.shape[1], codes.shape[2]
    if group > SURE:
        raise NotImplementedError(
            f"the kernel takes up to {SURE} query heads per KV head, got G={group}: use the reference"
        )
    table = tables(q, codebook, None, jnp.float32, by_query=True)
    chosen = tuning.settings(
        "vq_topk", Settings(), group=group, codes=n_codes, heads=batch * n_heads, slots=n_slots
    )
    number = lambda *shape: jax.ShapeDtypeStruct((batch, n_heads, *shape), jnp.int32)  # noqa: E731
    wanted = max(1, chosen.programs // (batch * n_heads))
    step = chosen.block * -(-n_slots // (chosen.block * wanted))
    n_parts = -(-n_slots // step)
    call = functools.partial(gpu_call, grid=(n_parts, n_heads, batch), warps=chosen.warps, stages=1)
    marks, kinds, quota = marked(table, counts, n, group, chosen.bound_warps)
    limit, sizes = min(group * k + n_always, n_slots), {"block": chosen.block, "step": step}
    ties = None
    if n_parts > 1:
        ties = call(
            functools.partial(_ties, **sizes), codes, marks, kinds, out_shape=number(n_parts, group),
            name="vq_topk_ties",
        )  # fmt: skip
    idx, count = call(
        functools.partial(_keep, **sizes), codes, marks, kinds, quota, ties,
        out_shape=(number(n_parts, limit if ties is None else step), number(n_parts)), name="vq_topk_keep",
    )  # fmt: skip
    if ties is None:
        return idx[:, :, 0]
    gather = functools.partial(_gather, block=chosen.block)
    return call(gather, idx, count, out_shape=number(limit), name="vq_topk_gather")


def _reader(codes_ref, marks_ref, kinds_ref, block: int, step: int):
    """Returns what says the slots of a step, and what loads codes, their kinds and some codes' marks."""
    part, head, row = program_id(0), program_id(1), program_id(2)
    n_slots, n_codes = codes_ref.shape[2], marks_ref.shape[2]

    def slots(i):
        return part * step + i * block + jnp.arange(block)

    def codes(i):
        return triton.load(codes_ref.at[row, head, slots(i)], mask=slots(i) < n_slots, other=-1)

    def kinds(code):
        known = code.astype(jnp.uint32) < n_codes  # and not below 0
        word = triton.load(kinds_ref.at[row, head, code >> 4], mask=known, other=0)
        return word >> ((code & 15) << 1)

    def marks(code, some):
        return triton.load(marks_ref.at[row, head, code], mask=some, other=0)

    return slots, codes, kinds, marks


def _two(marks, a: int, b: int):
    """Returns a word for each mark: whether it has query head a's bit, and 2^16 for b's."""
    return marks >> a & 1 | (marks >> b & 1) << 16 if a != b else marks >> a & 1


def _each(group: int, count) -> list:
    """Returns what is counted for each query head, of a block's slots; `count` counts for two at once."""
    pairs = [(a, min(a + 1, group - 1)) for a in range(0, group, 2)]
    words = [count(a, b) for a, b in pairs]
    halves = [x for word in words for x in (word & 0xFFFF, word >> 16 & 0xFFFF)]
    return halves[:group]


def _ties(
    codes_ref,  # [B K S]
    marks_ref,  # [B K C]
    kinds_ref,  # [B K C/16]
    ties_ref,  # [B K T G]
    *,
    block: int,
    step: int,
):
    """Counts one part's slots at the thresholds of the query heads."""
    part, head, row = program_id(0), program_id(1), program_id(2)
    group = ties_ref.shape[3]
    _, codes, kinds, marks = _reader(codes_ref, marks_ref, kinds_ref, block, step)

    def count(i, seen):
        code = codes(i).astype(jnp.int32)
        mark = marks(code, kinds(code) & 2 > 0)
        new = _each(group, lambda a, b: jnp.sum(_two(mark, a, b), axis=0))
        return tuple(map(jnp.add, seen, new))

    for g, n in enumerate(jax.lax.fori_loop(0, step // block, count, (jnp.int32(0),) * group)):
        ties_ref[row, head, part, g] = n


def _keep(
    codes_ref,  # [B K S]
    marks_ref,  # [B K C]
    kinds_ref,  # [B K C/16]
    quota_ref,  # [B K G]
    ties_ref,  # [B K T G], None for one part
    idx_ref,  # [B K T P], of one part [B K 1 N]
    count_ref,  # [B K T]
    *,
    block: int,
    step: int,
):
    """Compacts one part: what is marked, surely taken, or among the first at a threshold."""
    part, head, row = program_id(0), program_id(1), program_id(2)
    group, room = quota_ref.shape[2], idx_ref.shape[3]
    slots, codes, kinds, marks = _reader(codes_ref, marks_ref, kinds_ref, block, step)
    left = [quota_ref[row, head, g] for g in range(group)]  # that this part may take
    if ties_ref is not None:
        t = jnp.arange(pl.next_power_of_2(ties_ref.shape[2]))
        for g in range(group):
            before = triton.load(ties_ref.at[row, head, t, g], mask=t < part, other=0)
            left[g] -= jnp.sum(before, axis=0)

    def write(n, at, inside):
        place = n + jnp.cumsum(inside, axis=0) - inside
        triton.store(idx_ref.at[row, head, part, place], at, mask=(inside > 0) & (place < room))
        return n + jnp.sum(inside, axis=0)

    def first_few(n, at, inside, ties, seen):
        here = _each(group, lambda a, b: jnp.cumsum(_two(ties, a, b), axis=0))
        for g, before in enumerate(seen):
            inside |= (ties >> g & 1) & (before + here[g] <= left[g]).astype(jnp.int32)
        return write(n, at, inside)

    def tied(n, at, inside, code, some, seen):
        ties = marks(code, some)
        new = _each(group, lambda a, b: jnp.sum(_two(ties, a, b), axis=0))
        after = tuple(map(jnp.add, seen, new))
        whole, parted = jnp.int32(0), jnp.bool_(False)  # heads that take all of these; does one take a few?
        for g, (before, then) in enumerate(zip(seen, after, strict=True)):
            whole |= (then <= left[g]).astype(jnp.int32) << g
            parted |= (before < left[g]) & (left[g] < then)

        def all_or_none(n, at, inside, ties, _):
            return write(n, at, inside | (ties & whole > 0).astype(jnp.int32))

        return jax.lax.cond(parted, first_few, all_or_none, n, at, inside, ties, seen), after

    def body(i, carry):
        n, seen, code = carry
        ahead = codes(i + 1)  # a step waits for a load that the one before has begun
        at, code = slots(i), code.astype(jnp.int32)
        kind = kinds(code)
        inside, some = (kind & 1) | (code < -1).astype(jnp.int32), kind & 2 > 0
        wanting = functools.reduce(jnp.logical_or, (a < b for a, b in zip(seen, left, strict=True)))
        any_here = wanting & (jnp.sum(some.astype(jnp.int32), axis=0) > 0)
        untied = lambda n, at, inside, _c, _s, seen: (write(n, at, inside), seen)  # noqa: E731
        return *jax.lax.cond(any_here, tied, untied, n, at, inside, code, some, seen), ahead

    start = jnp.int32(0), (jnp.int32(0),) * group, codes(0)
    n, *_ = jax.lax.fori_loop(0, step // block, body, start)
    count_ref[row, head, part] = n
    if ties_ref is None:

        def pad(i, _):
            at = n + i * block + jnp.arange(block)
            triton.store(idx_ref.at[row, head, part, at], jnp.full((block,), -1), mask=at < room)
            return _

        jax.lax.fori_loop(0, (room - n + block - 1) // block, pad, 0)


def _gather(
    idx_ref,  # [B K T P]
    count_ref,  # [B K T]
    out_ref,  # [B K N]
    *,
    block: int,
):
    """Copies one part's slots behind those of the parts before it; the last part fills the rest."""
    part, head, row = program_id(0), program_id(1), program_id(2)
    n_parts, limit = idx_ref.shape[2], out_ref.shape[2]
    t = jnp.arange(pl.next_power_of_2(n_parts))
    start = jnp.sum(triton.load(count_ref.at[row, head, t], mask=t < part, other=0), axis=0)
    n = count_ref[row, head, part]
    end = jnp.where(part == n_parts - 1, limit - start, n)

    def body(i, _):
        at = i * block + jnp.arange(block)
        idx = triton.load(idx_ref.at[row, head, part, at], mask=at < n, other=-1)
        triton.store(out_ref.at[row, head, start + at], idx, mask=(at < end) & (start + at < limit))
        return _

    jax.lax.fori_loop(0, (end + block - 1) // block, body, 0)
