"""The norm from its equation, in float32."""

import jax
import jax.numpy as jnp

__all__ = ["run"]


def run(x, scale, *, eps: float):
    """Returns x / sqrt(mean x² + eps) · scale: [B M]."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)
