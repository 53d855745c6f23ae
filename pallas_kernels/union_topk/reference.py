"""The union of a group's top-k from its definition: mark, then rank what is marked."""

import jax
import jax.numpy as jnp

__all__ = ["run"]


def run(scores, *, k: int, limit: int):
    """Returns the indices [B K limit] that a query head of the group chooses, ascending, then -1."""
    batch, n_heads, _, size = scores.shape
    value, idx = jax.lax.top_k(scores, k)  # [B K G k]
    idx = jnp.where(value > -jnp.inf, idx, size).reshape(batch, n_heads, -1)
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(n_heads)[:, None]
    marked = jnp.zeros((batch, n_heads, size + 1), bool).at[row, head, idx].set(True)[..., :size]
    value, idx = jax.lax.top_k(jnp.where(marked, jnp.max(scores, axis=2), -jnp.inf), limit)
    idx = jnp.sort(jnp.where(value > -jnp.inf, idx, size), axis=-1)
    return jnp.where(idx < size, idx, -1)
