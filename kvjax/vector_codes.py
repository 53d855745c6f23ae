"""Ranks vectors, as they are or as codes of 8 bits with a scale and a least value each.

A channel of a coded vector differs by at most half its scale from what it was, and by the rounding of scale
and least value. A vector that is not there is inf, and so is its least value.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from kvjax.shapes import Leaf
from pallas_kernels.attention import encode

__all__ = ["Coded", "absent", "coded", "products"]


@struct.dataclass
class Coded:
    """Vectors as codes."""

    codes: Leaf  # [... N D] uint8
    scale: Leaf  # [... N 1]
    least: Leaf  # [... N 1]


def coded(x: Float[Array, "*B N D"]) -> Coded:
    """Returns vectors as codes.

    Example:
        >>> found = coded(jnp.asarray([[0.0, 51.0, 255.0], [jnp.inf] * 3]))
        >>> found.codes[0].tolist(), found.scale[0].tolist(), found.least[:, 0].tolist()
        ([0, 51, 255], [1.0], [0.0, inf])
    """
    there = x[..., :1] < jnp.inf
    codes, scale, least = encode(jnp.where(there, x, 0), 8, axis=-1)
    return Coded(codes, scale, jnp.where(there, least, jnp.inf))


def absent(x: Float[Array, "*B N D"] | Coded) -> Bool[Array, "*B N"]:
    """Returns which vectors are not there."""
    return (x.least if isinstance(x, Coded) else x)[..., 0] == jnp.inf


def products(q: Float[Array, "*B G D"], x: Float[Array, "*B N D"] | Coded) -> Float[Array, "*B G N"]:
    """Returns q·x in float32, of vectors that are there.

    Cost: reads the vectors, or their codes, once.
    """
    rows = x.codes if isinstance(x, Coded) else jnp.where(absent(x)[..., None], 0.0, x)
    exact, q = jax.lax.Precision.HIGHEST, q.astype(jnp.float32)
    found = jnp.einsum("...gd,...nd->...gn", q, rows.astype(jnp.float32), precision=exact)
    if not isinstance(x, Coded):
        return found
    scale, least = (jnp.swapaxes(y.astype(jnp.float32), -1, -2) for y in (x.scale, x.least))
    return found * scale + q.sum(-1, keepdims=True) * jnp.where(jnp.isfinite(least), least, 0.0)
