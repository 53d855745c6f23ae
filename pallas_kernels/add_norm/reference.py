"""The sum and its norm from their equations: the specification of the kernel."""

import jax
import jax.numpy as jnp

__all__ = ["normed", "run"]


def run(x, y, scale, *, eps: float):
    """Returns x + y and rsqrt(mean((x + y)²) + eps)·(x + y)·scale, [B M] each."""
    form = jnp.finfo(x.dtype)
    total = jax.lax.reduce_precision(x + y, form.nexp, form.nmant)  # XLA would norm a sum before its rounding
    return total, normed(total, scale, eps)


def normed(x, scale, eps: float):
    """Returns x over the root of its mean square, times the scale, in x's type."""
    wide = x.astype(jnp.float32)
    norm = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (norm * scale).astype(x.dtype)
