"""What the windowed rotation alone finds: tokens ranked as if all were equally far away, without codes.

A query head ranks the tokens between the first `n_sinks` and the newest `window`, whose true distances are
from `window` to the whole context. Codes can only lose what is left.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

import kvjax
from experiments import results
from experiments.a2ats_ranking import Asking
from experiments.a2ats_recall import records
from experiments.rows import start
from kvjax import text
from kvjax.methods import layers

__all__ = ["Distances", "distances"]

_FIGURES = ("recall", "mass_union", "read")


@dataclass(frozen=True)
class Distances:
    """What to rank.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics, whose documents are asked.
        docs: documents.
        context: tokens of a document.
        queries: tokens of a document's last quarter that ask.
        ratios: shares of the tokens that each query head reads.
        distances: tokens, at which all are ranked.
        window: newest tokens that are not ranked.
        n_sinks: first tokens that are not ranked.
        seed: chooses documents.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 4
    context: int = 2048
    queries: int = 32
    ratios: tuple[float, ...] = (0.015, 0.03, 0.06, 0.12)
    distances: tuple[int, ...] = (64, 256, 512, 1024, 2048, 4096)
    window: int = 64
    n_sinks: int = 8
    seed: int = 0
    out: Path = results.FOLDER


def distances(settings: Distances) -> int:
    """Ranks the tokens of each layer that is not stored yet, prints the means over layers and claims them."""
    stored, rows = start("a2ats", "distances", settings), []
    model, asked = kvjax.load(settings.model, settings.dtype), None
    for j, layer in enumerate(layers(model.config)):
        if layer.window is not None:
            continue
        wanted = [{"layer": j, "ratio": ratio, "far": far} for ratio, far in _cases(settings)]
        if any(stored.find(row) is None for row in wanted):
            asked = asked or records(model, settings)
            tried = [Asking.of(jax.tree.map(lambda x: x[0], each[j]), layer, settings) for each in asked]
            for row in wanted:
                stored = stored.add(row, _figures(tried, row["far"], row["ratio"]))
        rows += map(stored.find, wanted)
    name, claims = settings.model.split("-")[0], {}
    for ratio, far in _cases(settings):
        found = [row for row in rows if (row["ratio"], row["far"]) == (ratio, far)]
        means = {k: float(np.mean([row[k] for row in found])) for k in _FIGURES}
        print("exact" if far is None else far, ratio, *(f"{k} {x:.4f}" for k, x in means.items()), sep=" | ")
        claims |= {f"{name}.{'exact' if far is None else far}.{k}@{ratio:g}": x for k, x in means.items()}
    print(stored.claim(claims).path)
    return 0


def _cases(settings: Distances) -> list[tuple[float, int | None]]:
    """Returns shares and distances; None ranks by true ones."""
    return list(itertools.product(settings.ratios, (None, *settings.distances)))


def _figures(tried: list[Asking], far: int | None, ratio: float) -> dict[str, float]:
    """Returns means over documents, heads and queries."""
    each = [x.compared(x.logit if far is None else x.far(far), ratio) for x in tried]
    return {k: float(np.mean([values[k].mean() for values in each])) for k in _FIGURES}
