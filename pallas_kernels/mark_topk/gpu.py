"""Marks in Pallas Triton: a program bisects the keys of one row, which it holds if they fit a block."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.select_topk.gpu import LOWEST, bisect, ordered

__all__ = ["run"]

_BLOCK = 32768


def run(scores, k):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take.
    """
    if scores.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {scores.dtype=}")
    rows = scores.reshape(-1, scores.shape[-1])
    block = min(_BLOCK, max(16, pl.next_power_of_2(rows.shape[1])))
    marks = gpu_call(
        functools.partial(_mark, block=block),
        rows, k.reshape(-1),
        grid=(len(rows),), out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.int32),
        warps=max(1, min(32, block // 256)), name="mark_topk",
    )  # fmt: skip
    return (marks > 0).reshape(scores.shape)


def _mark(
    scores_ref,  # [I S]
    k_ref,  # [I]
    marks_ref,  # [I S]
    *,
    block: int,
):
    """Marks one row."""
    row, size = program_id(0), scores_ref.shape[1]
    k, steps = k_ref[row], pl.cdiv(size, block)

    def load(i):
        at = i * block + jnp.arange(block)
        x = triton.load(scores_ref.at[row, at], mask=at < size, other=-jnp.inf).astype(jnp.float32)
        return at, ordered(jnp.where(x == 0, 0.0, x))

    held = load(0) if steps == 1 else None
    read = lambda i: load(i) if held is None else held  # noqa: E731

    def total(inside):
        """Counts the scores for which inside(index, key)."""
        body = lambda i, n: n + jnp.sum(inside(*read(i)).astype(jnp.int32), axis=0)  # noqa: E731
        return jax.lax.fori_loop(0, steps, body, jnp.int32(0))

    highest = jax.lax.fori_loop(0, steps, lambda i, x: jnp.maximum(x, jnp.max(read(i)[1], axis=0)), LOWEST)
    least = jnp.int32(LOWEST + 1)
    start = (least, jnp.maximum(highest, least) + 1, total(lambda at, key: key >= least))
    low, n = bisect(lambda t: total(lambda at, key: key >= t), start, k, k)
    # Of equals the first are marked, up to which index is bisected too: negated, as counts rise with it.
    upto = lambda t: total(lambda at, key: (key > low) | ((key == low) & (at <= -t)))  # noqa: E731
    last, _ = bisect(upto, (jnp.int32(-size), jnp.int32(1), n), k, k)

    def write(i, _):
        at, key = read(i)
        inside = (key > low) | ((key == low) & (at <= -last))
        # Interpreted, what is masked is written back as it was: nothing of another program's lies there.
        triton.store(marks_ref.at[row, at], (inside & (k > 0)).astype(jnp.int32), mask=at < size)
        return _

    jax.lax.fori_loop(0, steps, write, 0)
