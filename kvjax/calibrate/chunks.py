"""Fits LeoAM's chunks to each layer, by what late queries of documents choose.

    leaf, known_by  those that catch the most attention, where abstracts and chunks together are as many bytes
    root            that with which the fewest chunks are evaluated; None where no tree saves evaluations

Source: LeoAM (arXiv 2506.20187): layers with larger deserts get larger chunks. The measures are ours.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import attend, cache, chunk_tree, replay
from kvjax.attend import Selection
from kvjax.cache import KV, Layer
from kvjax.methods import layers
from kvjax.methods.leoam import LeoAM
from kvjax.model import Model
from kvjax.models.decoder import Record
from kvjax.rope import rotate
from kvjax.shapes import Positions, Queries

__all__ = ["fit"]

_LEAVES, _ROOTS = (8, 16, 32), (32, 64, 128, 256, 512, 1024)


def fit(
    model: Model,
    method: LeoAM,
    documents: Int[np.ndarray, "N T"],
    *,
    n_queries: int = 8,
    leaves: Sequence[int] = _LEAVES,
    roots: Sequence[int] = _ROOTS,
    known_by: Sequence[str] = chunk_tree.KINDS,
) -> LeoAM:
    """Returns the method with leaf, root and known_by for each layer.

    Layers that are read in full, or through a window, keep theirs. Of equal leaves the larger is taken.

    Args:
        documents: all of one length; the longer, the more roots are worth.
        n_queries: of each document, spread over its last quarter.
        leaves: to choose from, those that the method's `pairs` divide.
        roots: to choose from, those that are whole leaves.
        known_by: to choose from.

    Raises:
        ValueError: for a method that reads everything, or has abstracts as codes; for documents of fewer
            tokens than four times the queries, or leaves of which none has the method's `pairs`.

    Cost: a dense prompt per document; per layer, document and size, a choice for each query.

    Example:
        >>> import kvjax
        >>> from kvjax import text
        >>> model = kvjax.load("smollm2-135m")
        >>> ids = text.documents(model.tokenizer, [text.PROSE], 1, 256, seed=0)
        >>> choices = {"leaves": (8, 16), "roots": (32,), "known_by": ("mean",)}
        >>> method = fit(model, LeoAM(0.2, window=16), ids, n_queries=2, **choices)
        >>> len(method.leaf), set(method.leaf) <= {8, 16}, set(method.root) <= {32, None}
        (30, True, True)
    """
    if method.topk is None:
        raise ValueError("sizes are fitted to what is chosen, got topk=None: give tokens or a share")
    if method.abstract_bits is not None:
        raise ValueError(
            f"chunks are fitted with abstracts as they are, got {method.abstract_bits=}: give None"
        )
    if documents.ndim != 2 or documents.shape[1] < 4 * n_queries or n_queries < 1:
        raise ValueError(
            "queries are tokens of the last quarter of documents [N T], got "
            f"{documents.shape=}, {n_queries=}: take longer documents, or fewer queries"
        )
    leaves = sorted((x for x in leaves if x % method.pairs == 0), reverse=True)
    if not leaves:
        raise ValueError(
            f"a leaf is `pairs` equal parts, got none such for {method.pairs=}: give other leaves"
        )
    read = [replay.record(model, [ids.tolist()], room=0)[2] for ids in documents]
    rows = []
    for j, layer in enumerate(layers(model.config)):
        own = method.for_layer(j, model.config.n_layers)
        if layer.window is not None or own.topk is None:
            rows.append(_given(method, j))
            continue
        here = [_asked(records[j], layer, documents.shape[1], n_queries) for records in read]
        rows.append(_fitted(own, here, list(itertools.product(leaves, known_by)), roots))
    leaf, root, kinds = zip(*rows, strict=True)
    return replace(method, leaf=leaf, root=root, known_by=kinds)


def _given(method: LeoAM, j: int) -> tuple[int, int | None, str]:
    """Returns a method's leaf, root and known_by of layer j."""
    return tuple(x[j] if isinstance(x, tuple) else x for x in (method.leaf, method.root, method.known_by))


def _asked(record: Record, layer: Layer, length: int, n: int) -> tuple[KV, Array, Array]:
    """Returns a state with a row for each of n queries, of what it sees; these queries; and their places."""
    at = np.linspace(3 * length // 4, length, n + 1)[1:].astype(int) - 1
    q, k = (x[0, -length:] for x in (record.q, record.k))
    pos = jnp.arange(length, dtype=jnp.int32)
    keys = jnp.swapaxes(rotate(k, jnp.broadcast_to(pos[:, None], k.shape[:2]), layer.rope), 0, 1)
    kv = cache.allocate(layer, n, (length,) * layer.n_kv_heads, k.dtype)
    place = jnp.tile(pos, layer.n_kv_heads)
    seen = jnp.asarray(at + 1, jnp.int32)
    return (
        kv.replace(
            k=jnp.broadcast_to(keys.reshape(1, -1, layer.head_dim), kv.k.shape),
            pos=jnp.broadcast_to(place, kv.pos.shape),
            mass=(place < seen[:, None]).astype(jnp.float32),
            fill=jnp.broadcast_to(seen[:, None], kv.fill.shape),
            seen=seen,
        ),
        q[at][:, None],
        seen[:, None] - 1,
    )


def _fitted(
    own: LeoAM,
    here: Sequence[tuple[KV, Array, Array]],
    chunks: Sequence[tuple[int, str]],
    roots: Sequence[int],
) -> tuple[int, int | None, str]:
    """Returns the best leaf, root and known_by of a layer.

    chunks: leaf and known_by, to choose from.
    """
    slots = max(here[0][0].slots)
    own = replace(own, tier="device", device_budget=None, host_budget=None, disk=None, root=None)
    wanted = (own.topk if isinstance(own.topk, int) else own.topk * slots) + _abstracts(own) * slots
    tried = []
    for leaf, known_by in chunks:
        one = replace(own, leaf=leaf, known_by=known_by)
        tokens = round(wanted - _abstracts(one) * slots)
        tried.append(_mean(replace(one, topk=min(max(tokens, leaf), slots)), here)[0])
    leaf, known_by = chunks[int(np.argmax(tried))]
    sizes = [None, *(root for root in roots if root % leaf == 0 and root > leaf)]
    made = [_mean(replace(own, leaf=leaf, known_by=known_by, root=root), here)[1] for root in sizes]
    return leaf, sizes[int(np.argmin(made))], known_by


def _abstracts(method: LeoAM) -> float:
    """Returns the bytes of abstracts of leaves, as a share of those of K and V."""
    return method.shape.vectors * method.pairs / method.leaf / 2


def _mean(method: LeoAM, here: Sequence[tuple[KV, Array, Array]]) -> np.ndarray:
    """Returns the attention that is caught, and the chunks that are evaluated: means over all queries."""
    return np.mean([np.asarray(_tried(*one, method=method)) for one in here], axis=0)


@functools.partial(jax.jit, static_argnames="method")
def _tried(kv: KV, q: Queries, pos: Positions, *, method: LeoAM) -> Float[Array, "2"]:
    """Returns the attention caught and the chunks evaluated, means over queries and heads."""
    kv = method.moved(kv, None)
    idx, evaluated = method.search(kv, q, pos)
    p = attend.weights(kv, q, pos)[:, :, 0]  # [B G R], summing to 1 for each KV head
    rows = attend.listed(kv, Selection(idx, method.leaf)).reshape(len(idx), -1)
    caught = jax.vmap(lambda p: cache.take(p, rows).sum(-1), 1)(p) / len(kv.slots)
    return jnp.stack([caught.mean(), evaluated.mean()])
