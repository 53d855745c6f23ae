"""Collects what codebooks are made of: keys, far queries and how flat attention is, in one pass over text.

    q̃ = q R_b                                   a query rotated to the distance b of all far keys
    Q2 = E[q̃ᵀ q̃]                                over the query heads of a KV head's group
    A = cholesky(Q2 / sqrt(mean(Q2_ab²)) + 1e-6 I)

Documents go through the model one at a time, all layers at once. Kept are Q2, the keys and queries of tokens
that were drawn beforehand, and per layer how much of the attention a selection would catch.

Source: A²ATS (arXiv 2502.12665); constants as in its released code. Flatness is ours.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import replay
from kvjax.cache import Layer
from kvjax.methods import layers
from kvjax.model import Model
from kvjax.models.decoder import Record
from kvjax.prefill_attention import precision
from kvjax.rope import rotate
from kvjax.shapes import Queries

__all__ = ["Statistics", "collect", "metric", "share"]

_RATIO, _SINKS = 0.03, 8  # what A²ATS selects: this share of the tokens, and the first ones
_ASKED = 8  # queries of a document whose attention is looked at


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of a model.

    Args:
        q2: Q2, not normalised.
        keys: un-rotated keys of drawn tokens, in the model's type.
        pos: their positions.
        queries: far queries q̃ of drawn tokens.
        share: of the attention, what exact top-k selection catches; mean over heads and queries.
    """

    q2: Float[np.ndarray, "L K D D"]
    keys: Float[np.ndarray, "L K N D"]
    pos: Int[np.ndarray, " N"]
    queries: Float[np.ndarray, "L R K G D"]
    share: Float[np.ndarray, " L"]


def collect(
    model: Model,
    documents: Int[np.ndarray, "N T"],
    *,
    n_keys: int,
    n_queries: int,
    far: int,
    window: int,
    seed: int,
    each: Callable[[], None] = lambda: None,
) -> Statistics:
    """Reads documents and returns the statistics of all layers.

    Args:
        documents: token ids.
        n_keys: tokens whose keys are kept, drawn uniformly from all; the same in all heads.
        n_queries: tokens whose queries are kept.
        far: distance in tokens.
        window: tokens that a selection catches anyway.
        each: called after each document.

    Cost: 2·N·T·H·D² FLOPs beside the model's; holds L·K·(n_keys + G·n_queries)·D numbers, and the records
    of one document.
    """
    c, length = model.config, documents.shape[1]
    key_at, query_at = (_drawn(documents.size, n, seed + i) for i, n in enumerate((n_keys, n_queries)))
    q2 = np.zeros((c.n_layers, c.n_kv_heads, c.head_dim, c.head_dim))
    keys = np.empty((c.n_layers, c.n_kv_heads, len(key_at), c.head_dim), model.dtype)
    queries = np.empty((c.n_layers, len(query_at), c.n_kv_heads, c.group, c.head_dim), np.float32)
    caught = np.zeros((c.n_layers, len(documents)))
    for i, ids in enumerate(documents):
        _, _, records = replay.record(model, [ids.tolist()], room=0, chunk=min(512, length))
        key_to, query_to = (
            slice(*np.searchsorted(at, (i * length, (i + 1) * length))) for at in (key_at, query_at)
        )
        for j, (r, layer) in enumerate(zip(records, layers(c), strict=True)):
            r = jax.tree.map(lambda x: x[:, -length:], r)  # without padding
            q = np.asarray(_far(r.q, layer=layer, far=far))[0]
            wide = np.float64(q.transpose(1, 0, 2, 3).reshape(c.n_kv_heads, -1, c.head_dim))
            q2[j] += np.swapaxes(wide, 1, 2) @ wide
            keys[j, :, key_to] = np.asarray(r.k)[0, key_at[key_to] - i * length].swapaxes(0, 1)
            queries[j, query_to] = q[query_at[query_to] - i * length]
            caught[j, i] = share(r, layer=layer, window=window) if layer.window is None else 1.0
        each()
    return Statistics(q2 / (documents.size * c.group), keys, key_at % length, queries, caught.mean(1))


def metric(q2: Float[np.ndarray, "K D D"]) -> Float[np.ndarray, "K D D"]:
    """Returns A of each head, in float32."""
    scale = np.sqrt(np.mean(q2**2, axis=(1, 2), keepdims=True))
    q2 = q2 / np.where(scale > 0, scale, 1)  # a head without queries ranks by nothing
    return np.linalg.cholesky(q2 + 1e-6 * np.eye(q2.shape[-1])).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("layer", "window"))
def share(record: Record, *, layer: Layer, window: int) -> Float[Array, ""]:
    """Returns how much of the attention of a document's last quarter a selection of tokens catches.

    Each query head selects its top 3% exactly, beside the newest `window` tokens and 8 sinks.
    """
    length = record.k.shape[1]
    pos = jnp.arange(length)
    at = jnp.linspace(3 * length // 4, length - 1, _ASKED).astype(int)
    q = rotate(record.q[0, at], jnp.broadcast_to(at[:, None, None], record.q[0, at].shape[:-1]), layer.rope)
    k = rotate(record.k[0], jnp.broadcast_to(pos[:, None], record.k[0].shape[:-1]), layer.rope)
    logit = jnp.einsum(
        "rkgd,tkd->kgrt", q, k, precision=precision(k.dtype), preferred_element_type=jnp.float32
    )
    logit = logit * layer.scale
    if layer.softcap is not None:
        logit = layer.softcap * jnp.tanh(logit / layer.softcap)
    p = jax.nn.softmax(jnp.where(pos <= at[:, None], logit, -jnp.inf), axis=-1)
    near = (pos > at[:, None] - window) | (pos < _SINKS)
    top = jax.lax.top_k(jnp.where(near, 0.0, p), max(1, int(_RATIO * length)))[0]
    return jnp.mean(jnp.sum(jnp.where(near, p, 0.0), -1) + jnp.sum(top, -1))


@functools.partial(jax.jit, static_argnames=("layer", "far"))
def _far(q: Queries, *, layer: Layer, far: int) -> Queries:
    """Returns q̃ in float32."""
    return rotate(q.astype(jnp.float32), jnp.full(q.shape[:-1], far), layer.rope)


def _drawn(total: int, n: int, seed: int) -> Int[np.ndarray, " N"]:
    """Returns n of `total` places in order, every set of them equally likely; all where there are fewer."""
    return np.sort(np.random.default_rng([seed, total]).choice(total, min(n, total), replace=False))
