"""The union of a group's top-k from its definition: mark, then rank what is marked."""

import jax
import jax.numpy as jnp

__all__ = ["run"]


def run(scores, *, k: int, limit: int):
    """Returns the indices [B K limit] that a query head of the group chooses, ascending, then -1."""
    size = scores.shape[-1]
    value, idx = jax.lax.top_k(scores, k)  # [B K G k]
    idx = jnp.where(value > -jnp.inf, idx, size)
    marked = jnp.any(jnp.any(idx[..., None] == jnp.arange(size), axis=-2), axis=-2)  # [B K S]
    value, idx = jax.lax.top_k(jnp.where(marked, jnp.max(scores, axis=2), -jnp.inf), limit)
    idx = jnp.sort(jnp.where(value > -jnp.inf, idx, size), axis=-1)
    return jnp.where(idx < size, idx, -1)
