"""The sum and its norm from their equations: the specification of the kernel."""

import jax
import jax.numpy as jnp

__all__ = ["run"]


def run(x, y, scale, *, eps: float):
    """Returns x + y and rsqrt(mean((x + y)²) + eps)·(x + y)·scale, [B M] each."""
    total = x + y
    wide = total.astype(jnp.float32)
    norm = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, (norm * scale).astype(x.dtype)
