"""Chunked bipartite matching with all similarities of a chunk at once: the specification of the kernels."""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["KINDS", "run"]

KINDS = ("cosine", "dot", "l2")


def run(k, mass, *, slots, chunk, stride, kind):
    """Returns (best [B R] int32, similarity [B R] float32)."""
    best, similarity, row = [], [], 0
    for size in slots:
        part = _head(k[:, row : row + size], mass[:, row : row + size], chunk, stride, kind)
        best.append(part[0])
        similarity.append(part[1])
        row += size
    return jnp.concatenate(best, axis=1), jnp.concatenate(similarity, axis=1)


def _head(k, mass, chunk: int, stride: int, kind: str):
    """Matches the slots of one head: k [B S D], mass [B S]."""
    batch, size = mass.shape
    fill = -size % chunk
    k = jnp.pad(k.astype(jnp.float32), ((0, 0), (0, fill), (0, 0))).reshape(batch, -1, chunk, k.shape[2])
    alive = jnp.pad(mass, ((0, 0), (0, fill))).reshape(k.shape[:3]) > 0
    k = jnp.where(alive[..., None], k, 0.0)
    at = np.arange(chunk)
    is_destination = at % stride == stride - 1
    sources, destinations = at[~is_destination], at[is_destination]
    a, b = k[:, :, sources], k[:, :, destinations]  # [B N A D], [B N C D]
    similarity = _similarity(a, b, kind)
    similarity = jnp.where(alive[:, :, None, destinations], similarity, -jnp.inf)
    top, which = jnp.max(similarity, axis=-1), jnp.argmax(similarity, axis=-1)
    found = alive[:, :, sources] & (top > -jnp.inf)
    slot = np.arange(k.shape[1])[:, None] * chunk + jnp.asarray(destinations)[which]
    best = jnp.full(alive.shape, -1, jnp.int32).at[:, :, sources].set(jnp.where(found, slot, -1))
    value = jnp.full(alive.shape, -jnp.inf).at[:, :, sources].set(jnp.where(found, top, -jnp.inf))
    return best.reshape(batch, -1)[:, :size], value.reshape(batch, -1)[:, :size]


def _similarity(a, b, kind: str):
    product = jnp.einsum("bnad,bncd->bnac", a, b, precision=jax.lax.Precision.HIGHEST)
    if kind == "dot":
        return product
    a2, b2 = (jnp.sum(x * x, axis=-1) for x in (a, b))
    if kind == "l2":
        return jnp.minimum(2 * product - a2[..., None] - b2[:, :, None], 0.0)
    norms = jnp.sqrt(a2)[..., None] * jnp.sqrt(b2)[:, :, None]
    return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1.0), 0.0)
