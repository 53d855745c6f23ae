"""How well tokens are ranked: the share of the true top tokens, and of the attention, that a ranking finds.

    exact       q·k with true rotations: what the others are compared with
    far         (q R_b)·k: the window's rotation alone, without codes
    rotated     codes of rotated keys, ‖k − c‖² least
    plain       codes of keys before their rotation, ranked by q R_b
    aware       the same, (k − c) Q2 (k − c)ᵀ least
    rounded     as `aware`, queries and codewords in bfloat16, as a model of that type has them
    refined     the same codebook after gradient steps on the scores
    quest       pages of 16 tokens by upper bounds, as many tokens as the union of `aware` reads

A query head ranks the tokens between the first `n_sinks` and the newest `window`; these are read anyway.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments import results
from experiments.a2ats_ranking import Book, ranked
from experiments.rows import check_apart, start
from kvjax import replay, text
from kvjax.cache import Layer
from kvjax.calibrate import kmeans, refine, statistics
from kvjax.methods import layers
from kvjax.models.decoder import Record
from kvjax.rope import rotate

__all__ = ["Recall", "recall", "records"]

_NAMES = ("exact", "far", "rotated", "plain", "aware", "rounded", "refined", "quest")
_FIGURES = ("recall", "mass", "mass_union", "read")


@dataclass(frozen=True)
class Recall:
    """What to rank.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics, whose documents are asked; none of those learned from.
        learned: text files, or pydoc_data.topics, that codebooks are made from.
        docs: documents.
        context: tokens of a document.
        queries: tokens of a document's last quarter that ask.
        ratios: shares of the tokens that each query head reads.
        centroids: of a codebook.
        tokens: tokens that codebooks are made from.
        iterations: of Lloyd, at most.
        steps: of refinement, 0 = none.
        window: newest tokens that are not ranked.
        n_sinks: first tokens that are not ranked.
        far: the distance at which tokens are ranked, in tokens.
        seed: chooses documents, seeds and batches.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    learned: tuple[str, ...] = ()
    docs: int = 4
    context: int = 2048
    queries: int = 32
    ratios: tuple[float, ...] = (0.015, 0.03, 0.06, 0.12)
    centroids: int = 4096
    tokens: int = 81920
    iterations: int = 300
    steps: int = 0
    window: int = 64
    n_sinks: int = 8
    far: int = 2048
    seed: int = 0
    out: Path = results.FOLDER


def recall(settings: Recall) -> int:
    """Ranks the tokens of each layer that is not stored yet, prints the means over layers and claims them."""
    check_apart("codebooks", settings)
    stored, rows = start("a2ats", "recall", settings), []
    model = kvjax.load(settings.model, settings.dtype)
    tried = _Tried(settings, model)
    for j in (j for j, layer in enumerate(layers(model.config)) if layer.window is None):
        own = [{"model": settings.model, "layer": j, "ratio": ratio} for ratio in settings.ratios]
        if any(stored.find(row) is None for row in own):
            figures = tried.figures(j)
            for row in own:
                stored = stored.add(row, figures[row["ratio"]])
            print(f"layer {j}", flush=True)
        rows += map(stored.find, own)
    claims = {}
    for ratio, name in itertools.product(settings.ratios, _names(settings)):
        found = [row[name] for row in rows if row["ratio"] == ratio]
        means = {k: float(np.mean([figures[k] for figures in found])) for k in _FIGURES}
        print(name, ratio, *(f"{k} {x:.4f}" for k, x in means.items()), sep=" | ")
        claims |= {f"{settings.model.split('-')[0]}.{name}.{k}@{ratio:g}": x for k, x in means.items()}
    print(stored.claim(claims).path)
    return 0


def _names(settings: Recall) -> list[str]:
    """Returns the ways to rank."""
    return [name for name in _NAMES if name != "refined" or settings.steps]


@dataclass(eq=False)
class _Tried:
    """What tokens are ranked by and for, read when it is first needed."""

    settings: Recall
    model: kvjax.Model

    @functools.cached_property
    def learned(self) -> statistics.Statistics:
        return _statistics(self.model, self.settings)

    @functools.cached_property
    def asked(self) -> list[tuple[Record, ...]]:
        return records(self.model, self.settings)

    def figures(self, j: int) -> dict[float, dict[str, dict[str, float]]]:
        """Returns the figures of each ratio and way in a layer: means over documents, heads and queries."""
        layer = layers(self.model.config)[j]
        books = _codebooks(self.learned, j, layer, self.settings)
        found: dict[float, dict[str, list[dict[str, float]]]] = {}
        for record in self.asked:
            one = jax.tree.map(lambda x: x[0], record[j])
            for (name, ratio), values in ranked(one, books, layer, self.settings):
                found.setdefault(ratio, {}).setdefault(name, []).append(values)
        return {
            ratio: {
                name: {k: float(np.mean([x[k] for x in each])) for k in _FIGURES} for name, each in of.items()
            }
            for ratio, of in found.items()
        }


def _statistics(model: kvjax.Model, settings: Recall) -> statistics.Statistics:
    n = settings.tokens // settings.context
    documents = text.documents(model.tokenizer, settings.learned, n, settings.context, settings.seed)
    return statistics.collect(
        model, documents, n_keys=settings.tokens, n_queries=4096, far=settings.far, window=settings.window,
        seed=settings.seed,
    )  # fmt: skip


def records(model: kvjax.Model, settings: Any) -> list[tuple[Record, ...]]:
    """Returns what each document's tokens attended with, by layer.

    settings: `texts`, `docs`, `context` and `seed`.
    """
    documents = text.documents(
        model.tokenizer, settings.texts, settings.docs, settings.context, settings.seed
    )
    chunk = min(512, settings.context)
    return [
        tuple(
            jax.tree.map(lambda x: x[:, -settings.context :], r)
            for r in replay.record(model, [ids.tolist()], room=0, chunk=chunk)[2]
        )
        for ids in documents
    ]


def _codebooks(found: statistics.Statistics, j: int, layer: Layer, settings: Recall) -> dict[str, Book]:
    """Returns the codebooks of one layer."""
    keys = jnp.asarray(found.keys[j], jnp.float32)
    key, fit = (
        jax.random.key(settings.seed),
        functools.partial(kmeans.fit, n_centroids=settings.centroids, n_iterations=settings.iterations),
    )
    same = jnp.broadcast_to(jnp.eye(keys.shape[-1]), (len(keys), *keys.shape[-1:] * 2))
    turned = rotate(keys, jnp.broadcast_to(jnp.asarray(found.pos), keys.shape[:2]), layer.rope)
    metric = jnp.asarray(statistics.metric(found.q2[j]))
    own = jnp.einsum("knd,kde->kne", keys, metric, precision=jax.lax.Precision.HIGHEST)
    books = {
        "rotated": Book(fit(turned, key).centroids, same, rotated=True),
        "plain": Book(fit(keys, key).centroids, same),
        "aware": Book(fit(own, key).centroids, metric),
    }
    books["rounded"] = replace(books["aware"], dtype=jnp.bfloat16)
    if settings.steps:
        back = jnp.swapaxes(jnp.linalg.inv(metric), -1, -2)
        far = jnp.einsum("rkgd,kde->kgre", jnp.asarray(found.queries[j]), back)
        start = fit(refine.split(own, 1)[0], key).centroids
        better = refine.refine(start, own, far, key, layer=layer, n_steps=settings.steps)
        books["refined"] = Book(better.centroids, metric)
    return books
