"""Top-k selection in Pallas Triton: guess a threshold from a sample, keep what passes, choose among it.

Three launches, and one read of the scores from memory:

    guess   one program per row bisects a sample for a key that all but surely k scores pass, and few more
    keep    every part of every row writes the scores that pass it, in order, and how many
    choose  one program per row bisects its candidates for the k-th key, and writes their indices

A guess is never trusted: a row where fewer than k scores pass is chosen from all its scores, which
takes longer and gives the same. Rows that one block holds need the last step alone.

Scores are compared as integer keys in float32's total order, where -0.0 is below 0.0, as in
lax.top_k. Arrays in Triton have sizes of powers of two: T2 pads the parts.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from pallas_kernels import tuning
from pallas_kernels.backend import gpu_call, pl, program_id, triton

__all__ = ["LOWEST", "Candidates", "Settings", "bisect", "bound", "choose", "keep", "ordered", "run"]

LOWEST = -0x7F800001  # the key of -inf, which is never chosen
_TOP = 0x7FFFFFFF


@dataclass(frozen=True)
class Settings:
    """How a row is cut.

    sample: scores of a row that the guess sees. block: scores per step of a part. parts: of a row,
    at most. width: candidates of each part per step of the choice. warps: of keep, then of the rest.
    """

    sample: int = 4096
    block: int = 2048
    parts: int = 32
    width: int = 256
    warps: int = 4
    row_warps: int = 8


@struct.dataclass
class Candidates:
    """Keys and indices that passed, for each of I rows and T parts, in order from each part's start."""

    key: Any  # [I T P]
    idx: Any  # [I T P]
    count: Any  # [I T]


def run(scores, *, k: int):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take.
    """
    rows = scores.reshape(-1, scores.shape[-1])
    return choose(*_narrow(rows, k), k).reshape(*scores.shape[:-1], k)


def bound(scores: Array, k: int) -> tuple[Array, Array]:
    """Returns, for rows [I S], key and index such that the k largest are above, or equal and up to it."""
    return choose(*_narrow(scores, k), k, bounds=True)


def _narrow(scores: Array, k: int) -> tuple[Array, Array | None, Candidates | None]:
    """Returns scores [I S], and unless they are few: the guess and what passes it."""
    if scores.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {scores.dtype=}")
    n, size = scores.shape
    chosen = _settings(n, size, k)
    if size <= chosen.parts * chosen.width:
        return scores, None, None
    row = jax.ShapeDtypeStruct((n,), jnp.int32)
    low, cut = gpu_call(
        functools.partial(_guess, k=k, sample=chosen.sample),
        scores, grid=(n,), out_shape=(row, row), warps=chosen.row_warps, stages=1, name="select_topk_guess",
    )  # fmt: skip
    return scores, low, keep(scores[:, None], low[:, None], cut[:, None], k)


def keep(scores: Array, low: Array, cut: Array, k: int) -> Candidates:
    """Returns what is within the bounds [I G] of any of G rows of scores [I G S], with its largest key."""
    n, _, size = scores.shape
    chosen = _settings(n, size, k)
    step = chosen.block * -(-size // (chosen.block * chosen.parts))
    n_parts = -(-size // step)
    part = jax.ShapeDtypeStruct((n, n_parts, step), jnp.int32)
    return gpu_call(
        functools.partial(_keep, block=chosen.block),
        scores, low, cut,
        grid=(n, n_parts),
        out_shape=Candidates(part, part, jax.ShapeDtypeStruct((n, n_parts), jnp.int32)),
        warps=chosen.warps, stages=1, name="select_topk_keep",
    )  # fmt: skip


def choose(scores: Array | None, low: Array | None, kept: Candidates | None, k: int, *, bounds: bool = False):
    """Returns the indices [I k] of the k largest, or their bounds (key [I], index [I]).

    scores: [I S], None where what is kept surely holds them. low: the guess behind what is kept.
    """
    n, size = scores.shape if kept is None else (kept.key.shape[0], math.prod(kept.key.shape[1:]))
    chosen = _settings(n, size, k)
    row, out = jax.ShapeDtypeStruct((n,), jnp.int32), jax.ShapeDtypeStruct((n, k), jnp.int32)
    return gpu_call(
        functools.partial(_choose, k=k, width=chosen.width),
        scores, low, kept,
        grid=(n,),
        out_shape=(row, row) if bounds else out,
        warps=chosen.row_warps, stages=1, name="select_topk_bound" if bounds else "select_topk_choose",
    )  # fmt: skip


def _settings(n: int, size: int, k: int) -> Settings:
    return tuning.settings("select_topk", Settings(), rows=n, slots=size, k=k)


def ordered(x):
    """Returns integers in the order of floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ _TOP, jnp.minimum(bits, _TOP - 1))  # one more than a key is a number


def _over(reduce, x):
    """Reduces [T2 width] to a number; Triton reduces one axis at a time."""
    return reduce(reduce(x, axis=1), axis=0)


def bisect(count, start, least, most):
    """Returns a t with count(t) from least to most, else the largest with least or more, and its count.

    count falls as t rises. start: a low t and its count, which is returned where that is below least
    already, and between them a high t, of count below least.
    """

    def body(carry):
        low, high, n = carry
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # low + high would overflow
        n_middle = count(middle)
        enough = n_middle >= least
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, n_middle, n),
        )

    go_on = lambda carry: (carry[1] > carry[0] + 1) & (carry[2] > most)  # noqa: E731
    low, _, n = jax.lax.while_loop(go_on, body, start)
    return low, n


def _guess(
    scores_ref,  # [I S]
    low_ref,  # [I] key that surely more than k scores are above
    cut_ref,  # [I] up to which index those equal to it count too: none
    *,
    k: int,
    sample: int,
):
    """Bisects a sample of one row: one score from each stretch of it, at a place that looks random."""
    row, size = program_id(0), scores_ref.shape[1]
    stretch = -(-size // sample)
    i = jnp.arange(sample)
    at = i * stretch + (((i + row) * -1640531527 >> 8) & 0xFFFF) % stretch
    key = ordered(triton.load(scores_ref.at[row, at], mask=at < size, other=-jnp.inf))
    mean = k / stretch  # of the sample's scores among the k largest, six deviations from what follows
    rank = math.ceil(mean + 6 * math.sqrt(mean) + 6)
    count = lambda t: jnp.sum((key >= t).astype(jnp.int32), axis=0)  # noqa: E731
    least = jnp.int32(LOWEST + 1)
    low, _ = bisect(count, (least, jnp.max(key, axis=0) + 1, count(least)), rank, rank + rank // 8)
    low_ref[row] = low - 1
    cut_ref[row] = jnp.int32(-1)


def _keep(
    scores_ref,  # [I G S]
    low_ref,  # [I G]
    cut_ref,  # [I G]
    kept,  # Candidates
    *,
    block: int,
):
    """Compacts one part of one group of rows."""
    row, part = program_id(0), program_id(1)
    _, group, size = scores_ref.shape
    step = kept.key.shape[2]

    def body(i, n):
        at = part * step + i * block + jnp.arange(block)
        most, inside = jnp.full((block,), LOWEST, jnp.int32), jnp.zeros((block,), jnp.int32)
        for g in range(group):
            key = ordered(triton.load(scores_ref.at[row, g, at], mask=at < size, other=-jnp.inf))
            low, cut = low_ref[row, g], cut_ref[row, g]
            inside |= ((key > low) | ((key == low) & (at <= cut))).astype(jnp.int32)
            most = jnp.maximum(most, key)
        place = n + jnp.cumsum(inside, axis=0) - inside
        triton.store(kept.key.at[row, part, place], most, mask=inside > 0)
        triton.store(kept.idx.at[row, part, place], at, mask=inside > 0)
        return n + jnp.sum(inside, axis=0)

    kept.count[row, part] = jax.lax.fori_loop(0, step // block, body, jnp.int32(0))


def _reader(row, scores_ref, low_ref, kept, k: int, width: int):
    """Returns how many steps a row has, and what loads one: keys [T2 width] and their indices."""
    if kept is None:
        size = scores_ref.shape[1]
        n_parts, step = -(-size // width), width
    else:
        _, n_parts, step = kept.key.shape
        size = n_parts * step if scores_ref is None else scores_ref.shape[1]
    part = jnp.arange(pl.next_power_of_2(n_parts))
    count = jnp.clip(size - part * step, 0, step)  # all scores
    again = None  # whether to read all scores, though there are candidates
    if kept is not None:
        n = triton.load(kept.count.at[row, part], mask=part < n_parts, other=0)
        if scores_ref is not None:  # fewer than k candidates: the guess was too high
            again = (jnp.sum(n, axis=0) < k) & (low_ref[row] > LOWEST)
            n = jnp.where(again, count, n)
        count = n

    def load(i):
        lane = (i * width + jnp.arange(width))[None, :]
        inside = lane < count[:, None]
        at = part[:, None] * step + lane
        if kept is None:
            return ordered(triton.load(scores_ref.at[row, at], mask=inside, other=-jnp.inf)), at
        old = inside if again is None else inside & jnp.logical_not(again)
        place = (row, part[:, None], lane)
        key = triton.load(kept.key.at[place], mask=old, other=LOWEST)
        idx = triton.load(kept.idx.at[place], mask=old, other=0)
        if again is None:
            return key, idx
        x = triton.load(scores_ref.at[row, at], mask=inside & again, other=-jnp.inf)
        return jnp.where(again, ordered(x), key), jnp.where(again, at, idx)

    return (jnp.max(count, axis=0) + width - 1) // width, load


def _choose(
    scores_ref,  # [I S], or None
    low_ref,  # [I], or None
    kept,  # Candidates, or None
    *out_refs,  # [I k] indices; or [I] and [I], key and index of the last
    k: int,
    width: int,
):
    """Bisects one row for its k-th key, and among equals for the last index; writes what is within."""
    row = program_id(0)
    n_steps, load = _reader(row, scores_ref, low_ref, kept, k, width)
    size = math.prod(kept.key.shape[1:]) if scores_ref is None else scores_ref.shape[1]

    def survey(i, carry):
        key, _ = load(i)
        least, most, n = carry
        alive = key > LOWEST
        return (
            jnp.minimum(least, _over(jnp.min, jnp.where(alive, key, _TOP))),
            jnp.maximum(most, _over(jnp.max, key)),
            n + _over(jnp.sum, alive.astype(jnp.int32)),
        )

    def total(inside):
        """Counts the row's scores for which inside(key, index)."""
        body = lambda i, n: n + _over(jnp.sum, inside(*load(i)).astype(jnp.int32))  # noqa: E731
        return jax.lax.fori_loop(0, n_steps, body, jnp.int32(0))

    none = (jnp.int32(_TOP), jnp.int32(LOWEST), jnp.int32(0))
    least, most, n = jax.lax.fori_loop(0, n_steps, survey, none)
    low, n = bisect(lambda t: total(lambda key, at: key >= t), (least, most + 1, n), k, k)
    # Of equals the first are taken, up to which index is bisected too: negated, as counts rise with it.
    ahead = lambda t: total(lambda key, at: (key > low) | ((key == low) & (at <= -t)))  # noqa: E731
    last, _ = bisect(ahead, (jnp.int32(-size), jnp.int32(1), n), k, k)
    if len(out_refs) == 2:
        out_refs[0][row], out_refs[1][row] = low, -last
        return

    def chosen(i):
        key, at = load(i)
        return ((key > low) | ((key == low) & (at <= -last))).astype(jnp.int32), at

    def write(i, place):
        inside, at = chosen(i)
        to = place[:, None] + jnp.cumsum(inside, axis=1) - inside
        triton.store(out_refs[0].at[row, to], at, mask=(inside > 0) & (to < k))
        return place + jnp.sum(inside, axis=1)

    n_parts = pl.next_power_of_2(-(-size // width) if kept is None else kept.key.shape[1])
    per_part = jax.lax.fori_loop(
        0, n_steps, lambda i, n: n + jnp.sum(chosen(i)[0], axis=1), jnp.zeros((n_parts,), jnp.int32)
    )
    jax.lax.fori_loop(0, n_steps, write, jnp.cumsum(per_part, axis=0) - per_part)

    def pad(i, _):
        to = i * width + jnp.arange(width)
        triton.store(out_refs[0].at[row, to], jnp.full((width,), -1), mask=(to >= n_chosen) & (to < k))
        return _

    n_chosen = jnp.sum(per_part, axis=0)
    jax.lax.fori_loop(n_chosen // width, -(-k // width), pad, 0)
