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

__all__ = ["Asking", "Book", "ranked"]

_PAGE = 16


@dataclass(frozen=True, eq=False)
class Book:
    """Codewords in the frame k A, and A; both [K ...].

    rotated: of keys that were rotated. dtype: that queries and codewords are rounded to, to be ranked by.
    """

    centroids: Float[Array, "K C D"]
    metric: Float[Array, "K D D"]
    rotated: bool = False
    dtype: Any = jnp.float32


@dataclass(frozen=True, eq=False)
class Asking:
    """What queries of one document ask of one layer, and what is true."""

    q: Float[Array, "Q K G D"]  # before their rotation
    k: Float[Array, "T K D"]
    turned: Float[Array, "Q K G D"]  # rotated
    here: Float[Array, "T K D"]
    at: Int[Array, " Q"]  # their positions
    logit: Float[Array, "K G Q T"]
    p: Float[Array, "K G Q T"]  # the attention
    ranks: Bool[Array, "Q T"]  # the tokens that are ranked
    always: Bool[Array, "Q T"]  # those that are read anyway
    layer: Layer

    @classmethod
    def of(cls, record: Record, layer: Layer, settings: Any) -> "Asking":
        """Asks.

        record: of one row, [T ...]. settings: those of `Recall` that say who asks, and what is ranked.
        """
        length = len(record.k)
        at = np.linspace(3 * length // 4, length, settings.queries + 1)[1:].astype(int) // _PAGE * _PAGE - 1
        pos, at = jnp.arange(length), jnp.asarray(at)
        q, k = record.q[at].astype(jnp.float32), record.k.astype(jnp.float32)
        turned = rotate(q, jnp.broadcast_to(at[:, None, None], q.shape[:3]), layer.rope)
        here = rotate(k, jnp.broadcast_to(pos[:, None], k.shape[:2]), layer.rope)
        logit = _products(turned, here)
        ranks = (pos >= settings.n_sinks) & (pos <= at[:, None] - settings.window)
        seen = logit * layer.scale
        if layer.softcap is not None:
            seen = layer.softcap * jnp.tanh(seen / layer.softcap)
        p = jax.nn.softmax(jnp.where(pos <= at[:, None], seen, -jnp.inf), axis=-1)
        return cls(q, k, turned, here, at, logit, p, ranks, (pos <= at[:, None]) & ~ranks, layer)

    def far(self, distance: int) -> Float[Array, "K G Q T"]:
        """Returns the scores of all tokens as if they were so far away."""
        return _products(self.turned_by(distance), self.k)

    def turned_by(self, distance: int) -> Float[Array, "Q K G D"]:
        """Returns the queries rotated by a distance."""
        return rotate(self.q, jnp.full(self.q.shape[:3], distance), self.layer.rope)

    def n(self, ratio: float) -> Int[Array, " Q"]:
        """Returns how many tokens each query chooses."""
        return jnp.maximum(1, jnp.floor(ratio * (self.at + 1))).astype(jnp.int32)

    def compared(self, score: Float[Array, "K G Q T"], ratio: float) -> dict[str, Array]:
        """Returns how a choice by these scores compares with the true one."""
        n = self.n(ratio)
        true = _top(self.logit, self.ranks, n)
        return _compared(_top(score, self.ranks, n), true, self.always, self.p, n)


def ranked(
    record: Record, books: Mapping[str, Book], layer: Layer, settings: Any
) -> Iterator[tuple[tuple[str, float], dict[str, float]]]:
    """Yields (way, ratio) and the figures of one document in one layer; see `Asking.of`."""
    asking = Asking.of(record, layer, settings)
    far = asking.turned_by(settings.far)
    scores = {"exact": asking.logit, "far": asking.far(settings.far)}
    for name, book in books.items():
        turned = book.rotated
        scores[name] = _coded(asking.turned if turned else far, asking.here if turned else asking.k, book)
    for ratio in settings.ratios:
        for name, score in scores.items():
            values = asking.compared(score, ratio)
            if name == "aware":
                pages = jnp.ceil(values["read"] * (asking.at + 1) / _PAGE).astype(jnp.int32)
            yield (name, ratio), {k: float(jnp.mean(x)) for k, x in values.items()}
        n, chosen = asking.n(ratio), _pages(asking.turned, asking.here, asking.at, pages)
        true = _top(asking.logit, asking.ranks, n)
        values = _compared(chosen & asking.ranks, true, chosen, asking.p, n)
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
    words = jnp.einsum("kcd,kde->kce", book.centroids, jnp.linalg.inv(book.metric), **exact)
    q, words = (x.astype(book.dtype).astype(jnp.float32) for x in (q, words))
    table = jnp.einsum("qkgd,kcd->kgqc", q, words, **exact)
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
