"""The join of what programs found in splits of a head's slots, in Pallas Triton. Logits are in base 2."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.rows_gpu import lanes

__all__ = ["LOG2E", "LOWEST", "join_splits", "log_sum"]

LOWEST = -1e30  # below every logit, and finite: differences of two stay numbers
LOG2E = 1.4426950408889634
_FEW = 264  # programs: twice the multiprocessors of an H100


def log_sum(top: jax.Array, total: jax.Array) -> jax.Array:
    """Returns the natural log-sum-exp of logits in base 2."""
    return jnp.where(total > 0, (top + jnp.log2(jnp.maximum(total, 1e-30))) / LOG2E, -jnp.inf)


def join_splits(parts: tuple, counts: np.ndarray, q: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B K G D], of q's type, and the natural log-sum-exp [B K G].

    parts: what the splits stored. counts: [K] splits of each head, which lie one after the other.
    """
    if len(parts) == 2:
        return parts[0].reshape(q.shape), parts[1]
    out, top, total = parts
    (batch, n_heads, group, size), n_most = q.shape, int(counts.max())
    spans = np.stack([starts(tuple(counts.tolist()))[:-1], counts], axis=1).astype(np.int32)
    columns = 32 if batch * n_heads * group < _FEW else size
    return gpu_call(
        functools.partial(_join, n_most=n_most, columns=columns),
        jnp.asarray(spans), out.reshape(*top.shape, size), top, total,
        grid=(batch, n_heads, group * pl.cdiv(size, columns)),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)),
        warps=4, stages=1, name=f"{name}_join",
    )  # fmt: skip


def _join(
    spans_ref,  # [K 2] first item of the head, number of items
    part_ref,  # [B I G D] sums of weighted values
    top_ref,  # [B I G]
    total_ref,  # [B I G]
    out_ref,  # [B K G D]
    lse_ref,  # [B K G]
    *,
    n_most: int,
    columns: int,
):
    """Joins the splits of some columns of one query head."""
    group, size = out_ref.shape[2:]
    batch, head, g, tile = program_id(0), program_id(1), program_id(2) % group, program_id(2) // group
    first, n = spans_ref[head, 0], spans_ref[head, 1]
    step_size = min(64 if columns > 32 else 128, lanes(n_most))
    item, d = jnp.arange(lanes(n_most)), tile * columns + jnp.arange(lanes(columns))
    top = triton.load(top_ref.at[batch, first + item, g], mask=item < n, other=LOWEST)
    most = jnp.max(top, axis=0)
    weight = jnp.exp2(top - most)
    total = jnp.sum(
        weight * triton.load(total_ref.at[batch, first + item, g], mask=item < n, other=0.0), axis=0
    )

    def step(i, out):
        at = i * step_size + jnp.arange(step_size)
        top = triton.load(top_ref.at[batch, first + at, g], mask=at < n, other=LOWEST)
        mask = (at < n)[:, None] & (d < size)[None, :]
        part = triton.load(part_ref.at[batch, (first + at)[:, None], g, d[None, :]], mask=mask, other=0.0)
        return out + jnp.sum(jnp.exp2(top - most)[:, None] * part, axis=0)

    out = jax.lax.fori_loop(0, (n + step_size - 1) // step_size, step, jnp.zeros((d.size,), jnp.float32))
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
    triton.store(out_ref.at[batch, head, g, d], out.astype(out_ref.dtype), mask=d < size)

    @pl.when(tile == 0)
    def _sum():
        lse_ref[batch, head, g] = log_sum(most, total)
