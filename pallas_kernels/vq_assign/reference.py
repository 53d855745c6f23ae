"""The nearest codeword from its equation, in float32: the specification of the kernels."""

import jax
import jax.numpy as jnp

__all__ = ["run"]

_ELEMENTS = 2**24  # distances held at a time


def run(x, codebook):
    """Returns the codes [B K T]."""
    c = codebook.astype(jnp.float32)
    lengths = jnp.sum(c * c, axis=-1)

    def nearest(x):  # [B K D], one token
        dots = jnp.einsum("bkd,kcd->bkc", x, c, precision=jax.lax.Precision.HIGHEST)
        gap = jnp.sum(x * x, axis=-1, keepdims=True) - 2 * dots + lengths
        return jnp.argmin(gap, axis=-1).astype(jnp.int16)  # the first of equal ones, or of NaN

    tokens = jnp.moveaxis(x.astype(jnp.float32), 2, 0)
    at_once = max(1, _ELEMENTS // (x.shape[0] * lengths.size))
    return jnp.moveaxis(jax.lax.map(nearest, tokens, batch_size=at_once), 0, 2)
