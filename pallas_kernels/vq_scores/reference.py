"""Scores by codes from their equation, in float32: the specification of the kernels."""

import jax
import jax.numpy as jnp

__all__ = ["ALWAYS", "run"]

ALWAYS = -2  # the code of a slot that ranks above all others


def run(q, codebook, codes, *, reduce, dtype):
    """Returns the scores [B K G S], or [B K S] reduced."""
    q, codebook = q.astype(jnp.float32), codebook.astype(jnp.float32)
    table = jnp.einsum("bkgd,kcd->bkgc", q, codebook, precision=jax.lax.Precision.HIGHEST)
    known = (codes >= 0) & (codes < codebook.shape[1])
    index = jnp.where(known, codes, 0).astype(jnp.int32)
    scores = jnp.take_along_axis(table, index[:, :, None], axis=-1)
    scores = jnp.where(known[:, :, None], scores, jnp.where(codes == ALWAYS, jnp.inf, -jnp.inf)[:, :, None])
    return (scores.max(2) if reduce == "max" else scores).astype(dtype)
