"""Top-k selection from its definition: `lax.top_k`, then sorted by index."""

import jax
import jax.numpy as jnp

__all__ = ["run"]


def run(scores, *, k: int):
    """Returns the indices [... k] of the k largest scores above -inf, ascending, then -1."""
    value, idx = jax.lax.top_k(scores, k)  # of equals the first
    size = scores.shape[-1]
    idx = jnp.sort(jnp.where(value > -jnp.inf, idx, size), axis=-1)
    return jnp.where(idx < size, idx, -1)
