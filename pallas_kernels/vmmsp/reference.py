"""The product from its equation, in float32: the specification of the kernels."""

import jax
import jax.numpy as jnp

__all__ = ["run"]


def run(x, gate, w_t, scale):
    """Returns gate[b, f]·scale[f]·Σ_m x[b, m]·w_t[f, m], and 0 where the gate is 0: [B F]."""
    x, w_t = x.astype(jnp.float32), w_t.astype(jnp.float32)
    out = jnp.einsum("bm,fm->bf", x, w_t, precision=jax.lax.Precision.HIGHEST)
    out = out if scale is None else out * scale
    return jnp.where(gate != 0, gate.astype(jnp.float32) * out, 0.0).astype(gate.dtype)
