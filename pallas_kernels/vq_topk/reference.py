"""Slots chosen by their codes from the definition: score all, take each head's largest, unite."""

import jax
import jax.numpy as jnp

from pallas_kernels.vq_scores import reference as vq_scores

__all__ = ["histogram", "marked", "run"]


def marked(codes):
    """Returns codes that take their slots whatever the score, and of such codes the plain ones; -1 stays."""
    return -2 - codes


def histogram(codes, n_codes: int):
    """Returns how many slots have each code, [B K C] int32."""
    b, k = jnp.arange(codes.shape[0])[:, None, None], jnp.arange(codes.shape[1])[:, None]
    at = jnp.where(codes >= 0, codes, n_codes).astype(jnp.int32)
    return jnp.zeros((*codes.shape[:2], n_codes), jnp.int32).at[b, k, at].add(1, mode="drop")


def run(q, codebook, codes, counts, n, *, k: int, n_always: int):
    """Returns the slots [B K N], ascending, then -1; counts are not needed here."""
    batch, n_heads, size = codes.shape
    scores = vq_scores.run(q, codebook, jnp.maximum(codes, -1), reduce=None, dtype=jnp.float32)
    value, idx = jax.lax.top_k(scores, k)  # [B K G k], of equals the first
    taken = (value > -jnp.inf) & (jnp.arange(k) < n[:, None, None, None])
    idx = jnp.where(taken, idx, size).reshape(batch, n_heads, -1)
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(n_heads)[:, None]
    inside = jnp.pad(codes < -1, ((0, 0), (0, 0), (0, 1))).at[row, head, idx].set(True)[..., :size]
    slots = jnp.sort(jnp.where(inside, jnp.arange(size), size), axis=-1)
    slots = slots[..., : min(q.shape[2] * k + n_always, size)]
    return jnp.where(slots < size, slots, -1)
