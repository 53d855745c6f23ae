"""Sorts each row."""

import jax.numpy as jnp

__all__ = ["run"]


def run(scores, k):
    """Returns the marks."""
    order = jnp.argsort(-scores.astype(jnp.float32), axis=-1, stable=True)
    among = jnp.broadcast_to(jnp.arange(scores.shape[-1]) < k[..., None], scores.shape)
    marks = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, among, axis=-1, inplace=False)
    return marks & (scores > -jnp.inf)
