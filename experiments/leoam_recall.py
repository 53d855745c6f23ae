"""How well chunks are ranked by their abstracts: the attention that they catch, for the bytes that are read.

    leaf N        chunks of N tokens by the smallest and largest key per channel
    N pairs       chunks of 16 by those of N parts
    N points      chunks of 16 by the means of N parts
    1 middle      chunks of 16 by the middle of their smallest and largest key
    N bits        by such vectors as codes, with a scale and a least value each
    true leaf N   chunks, or tokens, of largest attention: the most that a choice can catch

A choice has a share of the tokens, window and sinks included (`mass`, `far`: outside these); or abstracts and
chosen tokens together have that share of the bytes of K and V (`..._at_bytes`). `descents` are of a tree with
leaves of 16; it evaluates fewer chunks and chooses the same ones. `accepted` counts roots whose lower bound
is above the least bound that is chosen. `predictions` say how much of a choice is known a step, or a layer,
before. Figures of heads, queries and documents are means; `far` is a ratio of sums.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import kvjax
from experiments import results
from experiments.leoam_chunks import accepted, asked, chosen, descents, predictions
from experiments.rows import start
from kvjax import replay, states, text
from kvjax.calibrate import activations
from kvjax.methods import layers
from kvjax.methods.full import Full
from kvjax.models.decoder import Foresight, Record
from kvjax.rope import rotate

__all__ = ["Recall", "mean_of", "recall"]

_MULTIPLE = 64  # of the places of queries: leaves are whole there


@dataclass(frozen=True)
class Recall:
    """What to rank.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics.
        docs: documents.
        context: tokens of a document, a multiple of 256.
        queries: tokens of a document's last quarter that ask.
        shares: of the tokens, or the bytes, that a step reads.
        roots: tokens of a root, multiples of 16.
        window: newest tokens that are always read.
        n_sinks: first tokens that are always read.
        seed: chooses documents.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 4
    context: int = 4096
    queries: int = 8
    shares: tuple[float, ...] = (0.05, 0.1, 0.2)
    roots: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    window: int = 64
    n_sinks: int = 16
    seed: int = 0
    out: Path = results.FOLDER


def recall(settings: Recall) -> int:
    """Ranks the chunks of each layer that is not stored yet, prints means over layers and claims them.

    Raises:
        ValueError: for a context that queries' places do not divide.
    """
    if settings.context % (4 * _MULTIPLE) or not 1 <= settings.queries <= settings.context // (4 * _MULTIPLE):
        raise ValueError(
            f"a document's last quarter is a multiple of {_MULTIPLE} tokens, each with a query at most, got "
            f"context={settings.context}, queries={settings.queries}"
        )
    stored, rows = start("leoam", "recall", settings), []
    model = kvjax.load(settings.model, settings.dtype)
    tried = _Tried(settings, model)
    for j in (j for j, layer in enumerate(layers(model.config)) if layer.window is None):
        own = [{"model": settings.model, "layer": j, "share": share} for share in settings.shares]
        for row in own:
            if stored.find(row) is None:
                stored = stored.add(row, tried.figures(j, row["share"]))
            rows.append(found := stored.find(row))
            print(f"layer {j} | {row['share']} | far {found['ways']['leaf 16']['far']:.4f}", flush=True)
    stored = stored.claim(_claims(settings, rows))
    print(stored.path)
    return 0


def _claims(settings: Recall, rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Returns and prints the means over layers."""
    claims, model = {}, settings.model.split("-")[0]
    for share in settings.shares:
        mean = mean_of([row for row in rows if row["share"] == share])
        for part, way, k, x in mean:
            short = way.replace(" ", "_").replace(",", "")
            name = "mass_recall" if k == "mass" else k
            where = "" if part == "ways" else f"{part}."
            claims[f"{model}.{where}{short}.{name}@{share:g}"] = x
        for part, way in dict.fromkeys((part, way) for part, way, _, _ in mean):
            values = (f"{k} {x:.4f}" for p, w, k, x in mean if (p, w) == (part, way))
            print(share, part, way, *values, sep=" | ")
    return claims


def mean_of(rows: list[Mapping[str, Any]]) -> list[tuple[str, str, str, float]]:
    """Returns part, way, figure and its mean over rows, of the figures that all rows have.

    Those of a foreseen query are of all layers but the first.
    """
    found: dict[tuple[str, str, str], list[float | None]] = {}
    for row in rows:
        for part in ("ways", "descents", "accepted", "predictions"):
            for way, values in row[part].items():
                pairs = values.items() if isinstance(values, dict) else [("share", values)]
                for k, x in pairs:
                    found.setdefault((part, way, k), []).append(x)
    return [(*key, float(np.mean(x))) for key, x in found.items() if None not in x]


@dataclass(eq=False)
class _Tried:
    """What is asked, read when it is first needed."""

    settings: Recall
    model: kvjax.Model

    @functools.cached_property
    def at(self) -> Int[np.ndarray, " Q"]:
        """Where queries stand: the last tokens of some chunks of the last quarter."""
        length, n = self.settings.context, self.settings.queries
        ends = np.linspace(3 * length // 4, length, n + 1)[1:]
        return ends.astype(int) // _MULTIPLE * _MULTIPLE - 1

    @functools.cached_property
    def documents(self) -> Int[np.ndarray, "N T"]:
        s = self.settings
        return text.documents(self.model.tokenizer, s.texts, s.docs, s.context, s.seed)

    @functools.cached_property
    def records(self) -> list[tuple[Record, ...]]:
        """Of each document and layer, what attention was given, [T ...]."""
        found = []
        for ids in self.documents:
            records = replay.record(self.model, [ids.tolist()], room=0, chunk=min(512, len(ids)))[2]
            found.append(tuple(Record(*(x[0, -len(ids) :] for x in r)) for r in records))
        return found

    @functools.cached_property
    def inputs(self) -> list[list[Float[Array, "Q M"]]]:
        """Of each document and layer, its normed input where queries stand."""
        head = 3 * self.settings.context // 4
        found = []
        for ids in self.documents[:, None]:
            rest = ids.shape[1] - head
            _, state = kvjax.prefill(self.model, ids[:, :head], room=rest)
            state = states.widen(state, self.model, Full(), rest)  # a window's layers hold no more
            found.append(activations.run(self.model, ids[:, head:], _inputs, self.at - head, state=state))
        return found

    def foreseen(self, document: int, j: int) -> Float[Array, "Q K G D"] | None:
        """Returns the rotated queries that layer j would ask of the input of the layer before it."""
        if j == 0:
            return None
        params, config = self.model.params, self.model.config
        scale = params[f"layer_{j - 1}"]["attn_norm"]["scale"]
        x = (self.inputs[document][j - 1] / scale).astype(self.model.dtype)  # the input, but for its length
        q = Foresight(config).apply({"params": params[f"layer_{j}"]}, x[None])[0].astype(jnp.float32)
        at = jnp.broadcast_to(jnp.asarray(self.at)[:, None, None], q.shape[:3])
        return rotate(q, at, layers(config)[j].rope)

    def figures(self, j: int, share: float) -> dict[str, Any]:
        """Returns the figures of a layer: means over documents."""
        layer, found = layers(self.model.config)[j], []
        for i, records in enumerate(self.records):
            ask: Callable = functools.partial(asked, records[j], layer=layer, settings=self.settings)
            here, before = ask(self.at), ask(self.at - 1)
            found.append(
                {
                    "ways": chosen(here, share, self.settings),
                    "descents": descents(here, share, self.settings),
                    "accepted": accepted(here, share, self.settings),
                    "predictions": predictions(here, before, self.foreseen(i, j), share, self.settings),
                }
            )
        return _mean(found)


def _inputs(logits: Array, found: list[dict[str, Array]], at: Int[Array, " Q"]) -> list[Array]:
    """Returns the input of attention in each layer, of one row at some places."""
    return [layer["attn/q/in"][0, at] for layer in found]


def _mean(values: list[Any]) -> Any:
    """Returns the means of nested figures; of those that a document lacks, None."""
    if isinstance(values[0], dict):
        return {k: _mean([x[k] for x in values]) for k in values[0]}
    return None if any(x is None for x in values) else float(np.mean(values))
