"""Moves centroids so that attention over coded keys is that over the keys: the objective itself.

    s_t = q̃·k_t,  ŝ_t = q̃·c(k_t)                far scores over T sampled keys, scaled as the layer's
    minimise  E_q KL(softmax(s) ‖ softmax(ŝ))     by Adam

k-means minimises E_q E_k (s − ŝ)², every key alike; here a key counts as much as it is attended to. Codes are
the nearest centroids in the metric's frame, as they will be, chosen anew in every step and without a gradient
(straight-through): the gradient reaches the centroids that were chosen.

Keys and queries that no step sees judge the centroids; each head keeps those with the least held-out loss,
k-means' among them, so none is made worse by this measure.

Source: ours, inside the frame of A²ATS (arXiv 2502.12665).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from kvjax.cache import Layer
from pallas_kernels.vq_assign import vq_assign

__all__ = ["EVERY", "Refined", "refine", "score_loss", "split"]

_HELD = 10  # every tenth key and query is held out
_KEYS, _QUERIES = 4096, 64  # of a batch, per head; the held-out ones are at most as many
EVERY = 20  # steps between two looks at the held-out loss


class Refined(NamedTuple):
    """What refinement ends with.

    held_out: the loss in nats before the first step and after every 20th.
    """

    centroids: Float[Array, "K C D"]
    held_out: Float[np.ndarray, "R K"]


def refine(
    centroids: Float[Array, "K C D"],
    x: Float[Array, "K N D"],
    y: Float[Array, "K G R D"],
    key: Array,
    *,
    layer: Layer,
    n_steps: int,
    rate: float = 0.05,
) -> Refined:
    """Returns better centroids, and how the held-out loss went.

    Args:
        x: keys k A. The centroids were found without those that `split` holds out.
        y: far queries q̃ A⁻ᵀ, of which `split` holds some out too.
        n_steps: in multiples of 20, which it is rounded up to.
        rate: Adam's, as a share of the root mean square distance of a key's number to its centroid's.

    Raises:
        ValueError: for too few queries to hold one out.

    Cost: a step 2·K·T·(C + 2·G·R)·D FLOPs for T = 4096 keys and G·R = 64 queries per head.
    """
    if y.shape[2] < 2 or n_steps < 1:
        raise ValueError(f"refinement takes steps and 2 queries or more, got {n_steps=} and {y.shape[2]}")
    (x, x_out), (y, y_out) = split(x, 1), split(y, 2)
    x_out = x_out[:, :: -(-x_out.shape[1] // _KEYS)]  # from all of the text, which the order is of
    y_out = y_out[:, :, :: -(-y_out.shape[2] // _queries(y))]
    unit = rate * jnp.sqrt(jnp.mean((x_out - _coded(x_out, centroids)) ** 2, axis=(1, 2)))  # [K]
    state = optax.scale_by_adam().init(centroids)
    best, least = centroids, score_loss(centroids, x_out, y_out, layer=layer)
    curve = [least]
    for i in range(-(-n_steps // EVERY)):
        part = jax.random.fold_in(key, i)
        centroids, state = _steps(centroids, state, x, y, part, unit, layer=layer)
        now = score_loss(centroids, x_out, y_out, layer=layer)
        best = jnp.where((now < least)[:, None, None], centroids, best)
        least = jnp.minimum(least, now)
        curve.append(now)
    return Refined(best, np.asarray(jnp.stack(curve)))


def split(x: Array, axis: int) -> tuple[Array, Array]:
    """Returns what is learnt from, and every tenth, which is held out."""
    held = np.arange(x.shape[axis]) % _HELD == 0
    return jnp.compress(~held, x, axis=axis), jnp.compress(held, x, axis=axis)


@functools.partial(jax.jit, static_argnames="layer")
def score_loss(
    centroids: Float[Array, "K C D"], x: Float[Array, "K N D"], y: Float[Array, "K G R D"], *, layer: Layer
) -> Float[Array, " K"]:
    """Returns the mean KL divergence in nats of attention over the coded keys from that over the keys."""
    p, q = (_log_attention(y, keys, layer) for keys in (x, _coded(x, centroids)))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1), axis=(1, 2))


@functools.partial(jax.jit, static_argnames="layer")
def _steps(
    centroids: Array, state: Any, x: Array, y: Array, key: Array, unit: Array, *, layer: Layer
) -> tuple[Array, Any]:
    """Takes steps of Adam up to the next look, each with a batch of its own."""

    def total(centroids, x, y):
        return jnp.sum(score_loss(centroids, x, y, layer=layer))  # heads do not meet

    def step(carry, key):
        centroids, state = carry
        at_x, at_y = jax.random.split(key)
        batch = jax.random.choice(at_x, x, (min(_KEYS, x.shape[1]),), replace=False, axis=1)
        asked = jax.random.choice(at_y, y, (min(_queries(y), y.shape[2]),), replace=False, axis=2)
        updates, state = optax.scale_by_adam().update(jax.grad(total)(centroids, batch, asked), state)
        return (centroids - unit[:, None, None] * updates, state), None

    return jax.lax.scan(step, (centroids, state), jax.random.split(key, EVERY))[0]


def _coded(x: Array, centroids: Array) -> Float[Array, "K N D"]:
    """Returns the nearest centroid of each vector; which one it is has no gradient."""
    codes = vq_assign(jax.lax.stop_gradient(x)[None], jax.lax.stop_gradient(centroids))[0]
    return jnp.take_along_axis(centroids, codes.astype(jnp.int32)[..., None], axis=1)


def _log_attention(y: Array, x: Array, layer: Layer) -> Float[Array, "K G R N"]:
    """Returns the logarithm of the attention of far queries over keys."""
    logit = layer.scale * jnp.einsum("kgrd,knd->kgrn", y, x, precision=jax.lax.Precision.HIGHEST)
    if layer.softcap is not None:
        logit = layer.softcap * jnp.tanh(logit / layer.softcap)
    return jax.nn.log_softmax(logit, axis=-1)


def _queries(y: Array) -> int:
    """Returns how many tokens give a batch of queries."""
    return -(-_QUERIES // y.shape[1])
