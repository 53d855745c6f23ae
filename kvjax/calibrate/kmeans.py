"""Clusters the vectors of every KV head: k-means++ seeds, then Lloyd's iterations, on the accelerator.

    seeding    the next centroid is a vector drawn with probability ∝ D², its squared distance to the nearest
    Lloyd      codes by `vq_assign`, means by segment sums, until the loss falls by less than a share `tol`

An empty cluster is re-seeded with the vector that lies farthest in some other cluster, each with that of a
cluster of its own: equal vectors share a cluster, so no two seeds are equal. Sums are float32; a GPU adds
them in no fixed order, unless XLA_FLAGS has --xla_gpu_deterministic_ops=true.

Source: k-means++ (Arthur & Vassilvitskii, 2007) and Lloyd, with the limits of A²ATS (arXiv 2502.12665).
Its released code leaves an empty cluster a vector of zeros, and does not say what `tol` is relative to.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.vq_assign import vq_assign

__all__ = ["KMeans", "fit", "seeds"]

_SAME = 1e-6  # of a vector's squared length: distances below are rounding


class KMeans(NamedTuple):
    """What Lloyd's iterations end with.

    losses: mean squared distance to the nearest centroid before each iteration, NaN for those not run.
    """

    centroids: Float[Array, "K C D"]
    losses: Float[Array, "R K"]


@functools.partial(jax.jit, static_argnames=("n_centroids", "n_iterations", "tol"))
def fit(
    x: Float[Array, "K N D"], key: Array, *, n_centroids: int, n_iterations: int = 300, tol: float = 1e-4
) -> KMeans:
    """Returns centroids of each head's vectors.

    Args:
        x: float32, more vectors than centroids.
        key: for the seeds.
        tol: ends when no head's loss falls by more than this share, and no cluster was re-seeded.

    Cost: 2·K·N·C·D FLOPs for the seeds, in C rounds that read x, and as much per iteration.
    """

    def more(carry):
        i, *_, busy = carry
        return (i < n_iterations) & busy

    def step(carry):
        i, centroids, losses, _ = carry
        codes, now = _assign(x, centroids)
        centroids, seeded = _update(x, codes, centroids)
        before = jnp.where(i > 0, losses[i - 1], jnp.inf)
        busy = jnp.any(before - now > tol * before) | jnp.any(seeded)
        return i + 1, centroids, losses.at[i].set(now), busy | (i == 0)

    losses = jnp.full((n_iterations, x.shape[0]), jnp.nan, jnp.float32)
    start = (jnp.int32(0), seeds(x, key, n_centroids=n_centroids), losses, jnp.bool(True))
    _, centroids, losses, _ = jax.lax.while_loop(more, step, start)
    return KMeans(centroids, losses)


@functools.partial(jax.jit, static_argnames="n_centroids")
def seeds(x: Float[Array, "K N D"], key: Array, *, n_centroids: int) -> Float[Array, "K C D"]:
    """Returns vectors of x as first centroids; distinct ones where there are as many."""
    n_heads, n_vectors, size = x.shape
    after = functools.partial(jnp.searchsorted, side="right")
    draws = jax.random.uniform(key, (n_centroids, n_heads))

    def add(i, carry):
        centroids, gap = carry  # [K C D], [K N]: squared distances to the nearest centroid so far
        mass = jnp.cumsum(jnp.where(jnp.isinf(gap), 1.0, gap), axis=1)  # the first is any
        at = jnp.minimum(jax.vmap(after)(mass, draws[i] * mass[:, -1]), n_vectors - 1)
        new = jnp.take_along_axis(x, at[:, None, None], axis=1)  # [K 1 D]
        gap = jnp.minimum(gap, jnp.sum((x - new) ** 2, axis=-1))
        return jax.lax.dynamic_update_slice_in_dim(centroids, new, i, axis=1), gap

    start = (jnp.zeros((n_heads, n_centroids, size), x.dtype), jnp.full((n_heads, n_vectors), jnp.inf))
    return jax.lax.fori_loop(0, n_centroids, add, start)[0]


def _assign(x: Array, centroids: Array) -> tuple[Int[Array, "K N"], Float[Array, " K"]]:
    """Returns codes and the loss."""
    codes = vq_assign(x[None], centroids)[0].astype(jnp.int32)
    return codes, jnp.mean(_gaps(x, codes, centroids), axis=1)


def _gaps(x: Array, codes: Array, centroids: Array) -> Float[Array, "K N"]:
    """Returns the squared distance of each vector to the centroid of its code."""
    return jnp.sum((x - jnp.take_along_axis(centroids, codes[..., None], axis=1)) ** 2, axis=-1)


def _update(x: Array, codes: Array, centroids: Array) -> tuple[Float[Array, "K C D"], Bool[Array, "K C"]]:
    """Returns the means, with empty clusters re-seeded, and which were."""
    n = centroids.shape[1]
    segment = functools.partial(jax.ops.segment_sum, num_segments=n)
    sums, counts = jax.vmap(segment)(x, codes), jax.vmap(segment)(jnp.ones_like(x[..., 0]), codes)
    means = jnp.where(counts[..., None] > 0, sums / jnp.maximum(counts, 1)[..., None], centroids)
    gaps = _gaps(x, codes, means)
    gaps = jnp.where(gaps > _SAME * jnp.sum(x * x, axis=-1), gaps, 0.0)
    return jax.vmap(_reseed)(x, codes, gaps, means, counts == 0)


def _reseed(x: Array, codes: Array, gaps: Array, means: Array, empty: Array) -> tuple[Array, Array]:
    """Gives each empty cluster of one head the farthest vector of another, the worst clusters first."""
    n = means.shape[0]
    worst = jnp.maximum(jax.ops.segment_max(gaps, codes, num_segments=n), 0.0)  # [C]
    places = jnp.where(gaps == worst[codes], jnp.arange(len(codes)), len(codes))
    farthest = jax.ops.segment_min(places, codes, num_segments=n)  # [C] of N
    order = jnp.argsort(-worst)[jnp.maximum(jnp.cumsum(empty) - 1, 0)]  # which cluster gives its vector
    seeded = empty & (worst[order] > 0)
    return jnp.where(seeded[:, None], x[jnp.minimum(farthest[order], len(codes) - 1)], means), seeded
