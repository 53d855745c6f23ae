"""The product from its equation, in float32: the specification of the kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_matvec import cut

__all__ = ["run"]


def run(x, w, level, scale):
    """Returns Σ_f x[b, f]·w[f, m]·scale[m] over the rows f that the batch needs: [B M]."""
    x = cut(x, level)
    needed = jnp.any(x != 0, axis=0)
    w = jnp.where(needed[:, None], w.astype(jnp.float32), 0.0)  # 0·NaN is NaN
    out = jnp.einsum("bf,fm->bm", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
    return (out if scale is None else out * scale).astype(x.dtype)
