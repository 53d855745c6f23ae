"""The nearest codeword from its equation, in float32: the specification of the kernels."""

import jax
import jax.numpy as jnp

__all__ = ["run"]

_ELEMENTS = 2**24  # distances held at a time


def run(x, codebook):
    """Returns the codes [B K T]."""
    tokens = max(1, _ELEMENTS // (x.shape[0] * codebook.shape[0] * codebook.shape[1]))
    parts = [_nearest(x[:, :, at : at + tokens], codebook) for at in range(0, x.shape[2], tokens)]
    return jnp.concatenate(parts, axis=2) if parts else jnp.zeros(x.shape[:3], jnp.int16)


def _nearest(x, codebook):
    x, c = x.astype(jnp.float32), codebook.astype(jnp.float32)
    dots = jnp.einsum("bktd,kcd->bktc", x, c, precision=jax.lax.Precision.HIGHEST)
    gap = jnp.sum(x * x, axis=-1)[..., None] - 2 * dots + jnp.sum(c * c, axis=-1)[:, None]
    return jnp.argmin(gap, axis=-1).astype(jnp.int16)  # the first of equal ones, and of NaN
