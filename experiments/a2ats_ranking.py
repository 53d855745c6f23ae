"""Ranks the tokens of a document for its queries in several ways, and compares each with the truth."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import Layer
from kvjax.models.decoder import Record
from kvjax.rope import rotate
from pallas_kernels import vq_assign

__all__ = ["Book", "ranked"]

_PAGE = 16


@dataclass(frozen=True, eq=False)
class Book:
    """Codewords in the frame k A, and A; both [K ...]. rotated: of keys that were rotated."""

    centroids: Float[Array, "K C D"]
    metric: Float[Array, "K D D"]
    rotated: bool = False


def ranked(
    record: Record, books: Mapping[str, Book], layer: Layer, settings: Any
) -> Iterator[tuple[tuple[str, float], dict[str, float]]]:
    """Yields (way, ratio) and the figures of one document in one layer.

    record: of one row, [T ...]. settings: those of `Recall` that say who asks, and what is ranked.
    """
    length = len(record.k)
    at = np.linspace(3 * length // 4, length, settings.queries + 1)[1:].astype(int) // _PAGE * _PAGE - 1
    pos, at = jnp.arange(length), jnp.asarray(at)
    q = record.q[at].astype(jnp.float32)  # [Q K G D]
    k = record.k.astype(jnp.float32)  # [T K D]
    turned = rotate(q, jnp.broadcast_to(at[:, None, None], q.shape[:3]), layer.rope)
    far = rotate(q, jnp.full(q.shape[:3], settings.far), layer.rope)
    here = rotate(k, jnp.broadcast_to(pos[:, None], k.shape[:2]), layer.rope)
    logit = _products(turned, here)
    ranks = (pos >= settings.n_sinks) & (pos <= at[:, None] - settings.window)  # [Q T]
    always = (pos <= at[:, None]) & ~ranks
    seen = jnp.where(pos <= at[:, None], logit * layer.scale, -jnp.inf)
    if layer.softcap is not None:
        seen = jnp.where(pos <= at[:, None], layer.softcap * jnp.tanh(seen / layer.softcap), -jnp.inf)
    p = jax.nn.softmax(seen, axis=-1)
    scores = {"exact": logit, "far": _products(far, k)}
    for name, book in books.items():
        scores[name] = _coded(turned if book.rotated else far, here if book.rotated else k, book)
    for ratio in settings.ratios:
        n = jnp.maximum(1, jnp.floor(ratio * (at + 1))).astype(jnp.int32)
        true = _top(logit, ranks, n)
        for name, score in scores.items():
            chosen = _top(score, ranks, n)
            values = _compared(chosen, true, always, p, n)
            if name == "aware":
                pages = jnp.ceil(values["read"] * (at + 1) / _PAGE).astype(jnp.int32)
            yield (name, ratio), {k: float(jnp.mean(x)) for k, x in values.items()}
        chosen = _pages(turned, here, at, pages)
        values = _compared(chosen & ranks, true, chosen, p, n)
        yield ("quest", ratio), {k: float(jnp.mean(x)) for k, x in values.items()}


def _products(q: Float[Array, "Q K G D"], k: Float[Array, "T K D"]) -> Float[Array, "K G Q T"]:
    return jnp.einsum("qkgd,tkd->kgqt", q, k, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _top(
    score: Float[Array, "K G Q T"], ranks: Bool[Array, "Q T"], n: Int[Array, " Q"]
) -> Bool[Array, "K G Q T"]:
    """Says which tokens are the n[q] of largest score among those that are ranked."""
    order = jnp.argsort(-jnp.where(ranks, score, -jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return ranks & (rank < n[:, None])


def _coded(q: Float[Array, "Q K G D"], k: Float[Array, "T K D"], book: Book) -> Float[Array, "K G Q T"]:
    """Returns the scores by codes."""
    exact = {"precision": jax.lax.Precision.HIGHEST}
    own = jnp.einsum("tkd,kde->kte", k, book.metric, **exact)
    codes = vq_assign(own[None], book.centroids)[0].astype(jnp.int32)  # [K T]
    back = jnp.swapaxes(jnp.linalg.inv(book.metric), -1, -2)
    table = jnp.einsum("qkgd,kde,kce->kgqc", q, back, book.centroids, **exact)
    return jnp.take_along_axis(table, codes[:, None, None], axis=-1)


def _pages(
    q: Float[Array, "Q K G D"], k: Float[Array, "T K D"], at: Int[Array, " Q"], n: Float[Array, "K Q"]
) -> Bool[Array, "K 1 Q T"]:
    """Says which tokens are in the n[head, q] pages of largest bound, of the whole pages up to at[q]."""
    page = k.reshape(-1, _PAGE, *k.shape[1:])
    low, high = (jnp.moveaxis(f(page, 1), 0, 1) for f in (jnp.min, jnp.max))  # [K N D]
    bound = [
        jnp.einsum("qkgd,knd->kgqn", f(q, 0), x, precision=jax.lax.Precision.HIGHEST)
        for f, x in ((jnp.maximum, high), (jnp.minimum, low))
    ]
    score = jnp.max(bound[0] + bound[1], axis=1, keepdims=True)  # [K 1 Q N]
    whole = (jnp.arange(len(page)) + 1) * _PAGE <= at[:, None] + 1
    newest = jnp.arange(len(page)) == at[:, None] // _PAGE  # ranks highest, as in `Quest`
    score = jnp.where(newest, jnp.inf, score)
    order = jnp.argsort(-jnp.where(whole, score, -jnp.inf), axis=-1)
    chosen = whole & (jnp.argsort(order, axis=-1) < n[:, None, :, None])
    return jnp.repeat(chosen, _PAGE, axis=-1)


def _compared(
    chosen: Bool[Array, "K G Q T"], true: Bool[Array, "K G Q T"], always: Bool[Array, "..."],
    p: Float[Array, "K G Q T"], n: Int[Array, " Q"],
) -> dict[str, Array]:  # fmt: skip
    """Returns the share of the true top tokens and of the attention, and the share of tokens read."""
    union = jnp.any(chosen, axis=1, keepdims=True) | always
    tokens = jnp.sum(p > 0, axis=-1)[:, 0]  # [K Q]
    return {
        "recall": jnp.sum(chosen & true, -1) / jnp.minimum(n, jnp.maximum(1, jnp.sum(true, -1))),
        "mass": jnp.sum(jnp.where(chosen | always, p, 0.0), -1),
        "mass_union": jnp.sum(jnp.where(union, p, 0.0), -1),
        "read": jnp.sum(union[:, 0], -1) / jnp.maximum(tokens, 1),
    }
