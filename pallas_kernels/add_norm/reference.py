"""The sum and its norm from their equations: the specification of the kernel."""

import jax
import jax.numpy as jnp

__all__ = ["normed", "run"]


def run(x, y, scale, *, eps: float):
    """Returns x + y and rsqrt(mean((x + y)²) + eps)·(x + y)·scale, [B M] each."""
    total, form = x + y, jnp.finfo(x.dtype)
    if form.bits < 32:  # XLA would norm the sum before its rounding
        total = jax.lax.reduce_precision(total, form.nexp, form.nmant)
    return total, normed(total, scale, eps)


def normed(x, scale, eps: float):
    """Returns x over the root of its mean square, times the scale, in x's type."""
    wide = x.astype(jnp.float32)
    norm = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (norm * scale).astype(x.dtype)
