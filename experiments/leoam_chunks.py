"""Chooses chunks for the queries of one document and layer by abstracts, and compares with the truth."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import chunk_search, chunk_tree
from kvjax.cache import Layer
from kvjax.chunk_tree import Shape, Tree
from kvjax.models.decoder import Record
from kvjax.rope import rotate
from pallas_kernels import bound_scores

__all__ = ["WAYS", "Asked", "accepted", "asked", "chosen", "descents", "predictions"]

LEAF = 16  # tokens of a leaf where ways do not say


class Way(NamedTuple):
    """What leaves are known by."""

    shape: Shape
    bits: int | None = None  # of codes with a scale and a least value for each vector; None is bfloat16

    def share(self, head_dim: int) -> float:
        """Returns the bytes of all abstracts of leaves as a share of those of K and V in bfloat16."""
        vectors = self.shape.vectors * self.shape.pairs / self.shape.leaf / 2
        return vectors * (1 if self.bits is None else (self.bits * head_dim + 32) / (16 * head_dim))


WAYS: Mapping[str, Way] = {
    "leaf 8": Way(Shape(8, None)), "leaf 16": Way(Shape(16, None)), "leaf 32": Way(Shape(32, None)),
    "leaf 64": Way(Shape(64, None)), "2 pairs": Way(Shape(16, None, 2)), "4 pairs": Way(Shape(16, None, 4)),
    "leaf 8, 8 bits": Way(Shape(8, None), bits=8), "leaf 8, 4 bits": Way(Shape(8, None), bits=4),
    "1 point": Way(Shape(16, None, 1, "mean")), "2 points": Way(Shape(16, None, 2, "mean")),
    "4 points": Way(Shape(16, None, 4, "mean")), "leaf 8, 1 point": Way(Shape(8, None, 1, "mean")),
    "leaf 8, 1 point, 8 bits": Way(Shape(8, None, 1, "mean"), bits=8),
    "leaf 8, 1 point, 4 bits": Way(Shape(8, None, 1, "mean"), bits=4),
    "leaf 4, 1 point, 4 bits": Way(Shape(4, None, 1, "mean"), bits=4),
    "leaf 32, 1 point": Way(Shape(32, None, 1, "mean")),
    "leaf 32, 4 points": Way(Shape(32, None, 4, "mean")),
    "1 middle": Way(Shape(16, None, 1, "middle")),
    "leaf 8, 1 middle": Way(Shape(8, None, 1, "middle")),
    "leaf 8, 1 middle, 8 bits": Way(Shape(8, None, 1, "middle"), bits=8),
    "leaf 8, 1 middle, 4 bits": Way(Shape(8, None, 1, "middle"), bits=4),
    "leaf 4, 1 middle, 4 bits": Way(Shape(4, None, 1, "middle"), bits=4),
    "leaf 32, 1 middle": Way(Shape(32, None, 1, "middle")),
}  # fmt: skip


class Asked(NamedTuple):
    """What Q queries of a document see of T tokens."""

    q: Array  # [Q K G D] rotated
    keys: Array  # [K T D] rotated
    at: Array  # [Q] their positions
    p: Array  # [Q K G T] attention
    always: Array  # [Q T] bool, of the window and the sinks


def asked(record: Record, at: Int[np.ndarray, " Q"], layer: Layer, settings: Any) -> Asked:
    """Returns what queries at these positions see.

    record: of one row, [T ...]. settings: `window` and `n_sinks`.
    """
    at, length = jnp.asarray(at), len(record.k)
    pos = jnp.arange(length)
    q, k = record.q[at].astype(jnp.float32), record.k.astype(jnp.float32)
    q = rotate(q, jnp.broadcast_to(at[:, None, None], q.shape[:3]), layer.rope)
    keys = jnp.moveaxis(rotate(k, jnp.broadcast_to(pos[:, None], k.shape[:2]), layer.rope), 0, 1)
    logit = layer.scale * jnp.einsum("qkgd,ktd->qkgt", q, keys, precision=jax.lax.Precision.HIGHEST)
    if layer.softcap is not None:
        logit = layer.softcap * jnp.tanh(logit / layer.softcap)
    there = pos <= at[:, None]
    p = jax.nn.softmax(jnp.where(there[:, None, None], logit, -jnp.inf), axis=-1)
    always = there & ((pos < settings.n_sinks) | (pos > at[:, None] - settings.window))
    return Asked(q, keys, at, p, always)


@functools.partial(jax.jit, static_argnames="way")
def _tree(keys: Float[Array, "K T D"], at: Int[Array, " Q"], way: Way) -> Tree:
    """Returns for each query the tree of the tokens that it sees."""
    n_heads, length, size = keys.shape
    mass = jnp.tile(jnp.arange(length) <= at[:, None], (1, n_heads)).astype(jnp.float32)
    every = jnp.broadcast_to(keys.reshape(1, -1, size), (len(at), n_heads * length, size))
    tree = chunk_tree.build(every, mass, (length,) * n_heads, way.shape)
    if way.bits is None:
        return tree
    return tree.replace(low=_coded(tree.low, way.bits), high=_coded(tree.high, way.bits))


def _coded(x: Float[Array, "Q N D"] | None, bits: int) -> Float[Array, "Q N D"] | None:
    """Returns what codes of the vectors say; those without keys stay infinite."""
    if x is None:
        return None
    least, most = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale, least = (y.astype(jnp.bfloat16).astype(x.dtype) for y in ((most - least) / (2**bits - 1), least))
    codes = jnp.clip(jnp.round((x - least) / scale), 0, 2**bits - 1)
    return jnp.where(jnp.isfinite(x), codes * scale + least, x)


def _forced(here: Asked, leaf: int, settings: Any) -> Int[Array, "Q K F"]:
    """Returns the leaves of window and sinks."""
    newest = here.at[:, None] // leaf - jnp.arange((settings.window + leaf - 2) // leaf + 1)
    newest = jnp.where(newest >= jnp.maximum(here.at[:, None] + 1 - settings.window, 0) // leaf, newest, -1)
    first = jnp.arange(-(-settings.n_sinks // leaf))
    first = jnp.broadcast_to(first, (len(newest), len(first)))
    both = jnp.concatenate([newest, first], axis=1)
    return jnp.broadcast_to(both[:, None], (len(both), len(here.keys), both.shape[1]))


def _count(here: Asked, tokens: Float[Array, " Q"], leaf: int, settings: Any) -> Int[Array, " Q"]:
    """Returns how many leaves beside the forced ones have so many tokens together with these."""
    forced = _forced(here, leaf, settings)[:, 0]
    held = jax.nn.one_hot(forced, here.keys.shape[1] // leaf + 1)  # 0 for -1
    n = (held.max(1) > 0).sum(-1)
    return jnp.maximum(jnp.round(tokens / leaf - n), 0).astype(jnp.int32)


def _best(
    here: Asked,
    tokens: Float[Array, " Q"],
    way: Way,
    settings: Any,
    *,
    q: Array | None = None,
) -> tuple[Int[Array, "Q K N"], Int[Array, "Q K"]]:
    """Returns the leaves that hold so many tokens, those of window and sinks included, and evaluations."""
    (n_heads, length), shape = here.keys.shape[:2], way.shape
    tree, forced = _tree(here.keys, here.at, way), _forced(here, shape.leaf, settings)
    count, most = _count(here, tokens, shape.leaf, settings), -(-length // shape.leaf)
    q = here.q if q is None else q
    return _searched(tree, q, forced, most, (length,) * n_heads, shape, count)


_searched = jax.jit(chunk_search.best, static_argnums=(3, 4, 5))


def _tokens(idx: Int[Array, "Q K N"], leaf: int, here: Asked) -> Bool[Array, "Q K T"]:
    """Says which tokens lie in leaves."""
    n = -(-here.keys.shape[1] // leaf)
    b, h = jnp.arange(len(idx))[:, None, None], jnp.arange(idx.shape[1])[:, None]
    mask = jnp.zeros((*idx.shape[:2], n), bool).at[b, h, jnp.where(idx < 0, n, idx)].set(True, mode="drop")
    mask = jnp.repeat(mask, leaf, axis=-1)[..., : here.keys.shape[1]]
    return mask & (jnp.arange(mask.shape[-1]) <= here.at[:, None])[:, None]


@jax.jit
def _figures(mask: Bool[Array, "Q K T"], here: Asked) -> dict[str, Array]:
    """Returns the attention that tokens have, of all and outside window and sinks; and how many are useless.

    Of those read beside window and sinks these are not among as many of largest attention.
    """
    seen, ranks = (
        here.at + 1.0,
        ~here.always[:, None] & (jnp.arange(mask.shape[2]) <= here.at[:, None])[:, None],
    )
    mine, far = mask & ranks, jnp.where(ranks[:, :, None], here.p, 0.0)
    order = jnp.argsort(-jnp.where(ranks, far.sum(2), -1.0), axis=-1)
    top = jnp.argsort(order, axis=-1) < mine.sum(-1, keepdims=True)
    return {
        "mass": jnp.where(mask[:, :, None], here.p, 0.0).sum(-1).mean(),
        "far": jnp.where(mine[:, :, None], far, 0.0).sum() / far.sum(),
        "tokens": (mask.sum(-1) / seen[:, None]).mean(),
        "useless": 1 - (mine & top).sum() / jnp.maximum(mine.sum(), 1),
    }


def chosen(here: Asked, share: float, settings: Any) -> dict[str, dict[str, float | None]]:
    """Returns the figures of each way, where tokens are that share, and where bytes read are (`_at_bytes`).

    Also those of the best leaves, and of the best tokens, by their true attention.
    """
    seen, found = here.at + 1.0, {}
    for name, way in WAYS.items():
        abstracts, shape = way.share(here.keys.shape[2]), way.shape
        idx, _ = _best(here, share * seen, way, settings)
        values = _as_floats(_figures(_tokens(idx, shape.leaf, here), here)) | {"abstracts": abstracts}
        values["read"] = values["tokens"] + abstracts
        left = (share - abstracts) * seen
        if fits := bool((left >= settings.window + settings.n_sinks + 2 * shape.leaf).all()):
            idx, _ = _best(here, left, way, settings)
            equal = _as_floats(_figures(_tokens(idx, shape.leaf, here), here))
        for k in ("mass", "far", "tokens"):
            values[f"{k}_at_bytes"] = equal[k] if fits else None
        found[name] = values
    for leaf in (1, LEAF):
        mask = _truest(here, leaf, share * seen, settings)
        found[f"true leaf {leaf}"] = _as_floats(_figures(mask, here))
    return found


def _truest(here: Asked, leaf: int, tokens: Float[Array, " Q"], settings: Any) -> Bool[Array, "Q K T"]:
    """Says which tokens lie in the leaves of largest attention of the group, so many with the forced ones."""
    mass = here.p.sum(2).reshape(*here.p.shape[:2], -1, leaf).sum(-1)
    forced = _tokens(_forced(here, leaf, settings), leaf, here)[..., ::leaf]
    n = _count(here, tokens, leaf, settings) + forced[:, 0].sum(-1)
    order = jnp.argsort(-jnp.where(forced, jnp.inf, mass), axis=-1)
    mask = jnp.argsort(order, axis=-1) < n[:, None, None]
    return jnp.repeat(mask, leaf, axis=-1) & (jnp.arange(here.p.shape[-1]) <= here.at[:, None])[:, None]


def descents(here: Asked, share: float, settings: Any) -> dict[str, dict[str, float | None]]:
    """Returns for each size of roots the chunks evaluated, as shares of the leaves and of the tokens.

    Also what is caught at equal bytes, where only evaluated abstracts are read.
    """
    seen, found = here.at + 1.0, {}
    for root in settings.roots:
        way = Way(Shape(LEAF, root))
        _, evaluated = _best(here, share * seen, way, settings)
        left = share * seen - evaluated.mean(1)  # a box is as long as a token's key and value
        values = {
            "of_leaves": float((evaluated / jnp.ceil(seen / LEAF)[:, None]).mean()),
            "of_tokens": float((evaluated / seen[:, None]).mean()),
        }
        fits = bool((left >= settings.window + settings.n_sinks + 2 * LEAF).all())
        idx, again = _best(here, left, way, settings)
        figures = _as_floats(_figures(_tokens(idx, LEAF, here), here))
        read = float((again / seen[:, None]).mean()) + figures["tokens"]
        values |= {f"{k}_at_bytes": figures[k] if fits else None for k in ("mass", "far", "tokens")}
        found[str(root)] = values | {"read_at_bytes": read if fits else None}
    return found


def accepted(here: Asked, share: float, settings: Any) -> dict[str, float]:
    """Returns how many chunks' lower bounds are above the least bound that is chosen.

    `roots`: the share of whole chunks of each size beside window and sinks; `chosen_<size>`: the share of the
    chosen leaves that lie in such.
    """
    seen, found = here.at + 1.0, {}
    flat, (n_heads, length) = WAYS[f"leaf {LEAF}"], here.keys.shape[:2]
    idx, _ = _best(here, share * seen, flat, settings)
    score = chunk_search.scores(_tree(here.keys, here.at, flat), here.q, (length,) * n_heads, flat.shape)
    score = score.reshape(len(seen), n_heads, -1)
    mask = _tokens(idx, LEAF, here)[..., ::LEAF]
    free = ~_tokens(_forced(here, LEAF, settings), LEAF, here)[..., ::LEAF] & (score > -jnp.inf)
    least = jnp.where(mask & free, score, jnp.inf).min(-1, keepdims=True)
    for size in (LEAF, *settings.roots):
        way = Way(Shape(size, None))
        tree, n = _tree(here.keys, here.at, way), way.shape.n_leaves((length,) * n_heads)
        _, lower = bound_scores(here.q, tree.low, tree.high, n_blocks=n, lower=True)
        lower = lower.reshape(len(seen), n_heads, -1)
        taken = jnp.repeat(lower >= least, size // LEAF, axis=-1)[..., : free.shape[-1]] & free
        found[str(size)] = float(taken.sum() / free.sum())
        found[f"chosen_{size}"] = float((taken & mask).sum() / jnp.maximum((free & mask).sum(), 1))
    return found


def predictions(
    here: Asked, before: Asked, foreseen: Float[Array, "Q K G D"] | None, share: float, settings: Any
) -> dict[str, dict[str, float]]:
    """Returns how much of what is truly chosen, window and sinks aside, a prediction contains.

    Also the attention outside window and sinks that reading the prediction catches, of that of the truth.

    Args:
        before: one token earlier.
        foreseen: predicted queries, rotated.
    """
    seen, flat = here.at + 1.0, WAYS[f"leaf {LEAF}"]
    true, _ = _best(here, share * seen, flat, settings)
    guesses = {"last step": _best(before, share * seen, flat, settings)[0]}
    if foreseen is not None:
        guesses["foreseen query"] = _best(here, share * seen, flat, settings, q=foreseen)[0]
    truth = _tokens(true, LEAF, here)
    mine, found = truth & ~_tokens(_forced(here, LEAF, settings), LEAF, here), {}
    for name, idx in guesses.items():
        guess = _tokens(idx, LEAF, here)
        far = [float(_figures(mask, here)["far"]) for mask in (guess, truth)]
        found[name] = {"hit": float((mine & guess).sum() / mine.sum()), "far": far[0] / far[1]}
    return found


def _as_floats(figures: Mapping[str, Array]) -> dict[str, Any]:
    return {k: float(x) for k, x in figures.items()}
