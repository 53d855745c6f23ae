"""A²ATS's lines on the device: how many of the rows that a step reads lie there from earlier steps.

What each step reads is recorded once, with K and V on the device; caches of it are simulated, see `lru`: a
tier has lines for all that a step may read, about twice what it does read, so it cannot be measured with
fewer. The lines of a head are a multiple of the tokens that a step reads on average, over heads and layers.
Blocks of several tokens are given as many tokens of lines.

The first 64 steps fill the lines and are not counted. The newest tokens and the sinks, which a step always
reads, hardly ever miss; `hit_rate_ranked` leaves them out.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

import kvjax
from experiments import hits_plot, results
from experiments.a2ats_quality import row_of
from experiments.lru import lru_missed, needed_lines, tier_missed
from experiments.rows import measured, start
from experiments.selections import Steps, record
from kvjax import text, tiers
from kvjax.calibrate import codebooks
from kvjax.methods.a2ats import A2ATS

__all__ = ["Hits", "hits"]

_CLAIMED = 0.03  # the ratio whose hit rates are claimed


@dataclass(frozen=True)
class Hits:
    """Whose steps to record, and which caches of their rows to simulate.

    Args:
        calibration: a folder of `kvjax calibrate a2ats`.
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics, none that the codebooks were made from.
        docs: documents.
        context: tokens of a prompt.
        rest: tokens after it, each a decode step; the first 64 are not counted.
        ratios: shares of the tokens that each query head chooses.
        hot: tokens that the lines of a KV head hold, in units of what a step reads; 0 keeps none.
        block: tokens that are brought together, beside single ones.
        seed: chooses documents.
        out: the folder of results.
    """

    calibration: Path
    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 4
    context: int = 2048
    rest: int = 256
    ratios: tuple[float, ...] = (_CLAIMED,)
    hot: tuple[float, ...] = (0, 1, 2, 4, 8, 16)
    block: int = 16
    seed: int = 0
    out: Path = results.FOLDER


def hits(settings: Hits) -> int:
    """Simulates the lines that are not stored yet, prints the rows, claims their figures and draws them."""
    _check(settings)
    model = kvjax.load(settings.model, settings.dtype)
    books = codebooks.load(settings.calibration, model)
    flat, windows = books.flat, model.config.layer_windows
    if all(dense or w is not None for dense, w in zip(flat, windows, strict=True)):
        raise ValueError(
            f"steps choose tokens in layers that are ranked, got ({flat=}, {windows=}): take another model, "
            "or calibrate on more text"
        )
    methods = [A2ATS(ratio, books, window=books.window, far=books.far) for ratio in settings.ratios]
    stored, rows = start("a2ats", "hits", settings), []
    for method in methods:
        tried = _Tried(settings, model, method)
        row = row_of(method)
        stored = measured(stored, row, tried.chosen)
        rows.append(stored.find(row))
        step_tokens = rows[-1]["step_tokens"]
        for block in (1, settings.block):
            for hot in settings.hot:
                here = row | {"block": block, "hot": hot}
                stored = measured(stored, here, functools.partial(tried.figures, block, hot, step_tokens))
                rows.append(stored.find(here))
        jax.clear_caches()  # programs of one ratio serve no other
    stored = stored.claim(_claims(settings.model, rows))
    hits_plot.draw([row for row in rows if "hot" in row], stored.path.with_suffix(".png"))
    print(stored.path)
    return 0


def _check(settings: Hits) -> None:
    """Raises ValueError where there is nothing to count, or no such lines."""
    rest, block, hot = settings.rest, settings.block, settings.hot
    if rest <= tiers.STEPS:
        raise ValueError(
            f"steps after the first {tiers.STEPS} are counted, got ({rest=}): decode more tokens"
        )
    if block < 2 or min(hot, default=-1) < 0:
        raise ValueError(
            f"blocks are of 2 or more tokens, lines of 0 or more, got ({block=}, {hot=}): single tokens are "
            "simulated in any case"
        )


def _claims(model: str, rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures that are quoted: unions of all ratios, hit rates of one."""
    name, found = model.split("-")[0], {}
    for row in rows:
        if "hot" not in row:
            found[f"{name}.union@{row['ratio']:g}"] = row["union"]
        elif row["ratio"] == _CLAIMED:
            which = "hit_rate" if row["block"] == 1 else "hit_rate_blocks"
            found[f"{name}.{which}@{row['hot']:g}"] = row["hit_rate"]
            if "hit_rate_tier" in row:
                found[f"{name}.{which}_tier@{row['hot']:g}"] = row["hit_rate_tier"]
    return found


@dataclass(eq=False)
class _Tried:
    """What one ratio's steps have read."""

    settings: Hits
    model: kvjax.Model
    method: A2ATS
    curves: dict[tuple[int, bool], np.ndarray] = field(default_factory=dict)  # [L C], see `_missed`

    @functools.cached_property
    def steps(self) -> dict[int, Steps]:
        """Of each layer."""
        s = self.settings
        documents = text.documents(self.model.tokenizer, s.texts, s.docs, s.context + s.rest, s.seed)
        return record(self.model, self.method, documents, s.rest)

    def chosen(self) -> dict[str, Any]:
        """Returns the figures of what steps read, a step and KV head's mean, over layers and in each."""
        tokens, unions = [], []
        for steps in self.steps.values():
            sought = np.maximum(1, (np.float32(self.method.topk) * steps.seen).astype(int))
            union = self._ranked(steps).sum(-1) / sought  # [B K T]
            tokens.append(float((steps.slot >= 0).sum(-1)[..., tiers.STEPS :].mean()))
            unions.append(float(union[..., tiers.STEPS :].mean()))
        return {
            "layers": list(self.steps),
            "step_tokens": float(np.mean(tokens)),
            "step_tokens_layers": tokens,
            "union": float(np.mean(unions)),
            "union_layers": unions,
        }

    def figures(self, block: int, hot: float, step_tokens: float) -> dict[str, Any]:
        """Returns the figures of lines: those of exact LRU, and of the tier where it may have so few.

        step_tokens: what a step of a head reads.
        """
        layers = list(self.steps.values())
        lines = min(round(hot * step_tokens / block), layers[0].n_blocks(block))
        read = np.asarray([_counted((s.blocks(block) >= 0).sum((0, 1, 3))) for s in layers])
        missed = self._missed(block, lines)
        values = {
            "lines": lines,
            "share_held": min(1.0, lines * block / float(layers[0].seen[tiers.STEPS :].mean())),
            **_rates("hit_rate", missed, read),
            **self._brought("brought", missed * block),
        }
        if block == 1:
            ranked = np.asarray([_counted(self._ranked(s).sum((0, 1, 3))) for s in layers])
            values |= _rates("hit_rate_ranked", self._missed(block, lines, ranked=True), ranked)
        if lines >= needed_lines(layers[0], block):
            tier = np.asarray([_counted(tier_missed(s, block, lines).sum((0, 1))) for s in layers])
            values |= _rates("hit_rate_tier", tier, read) | self._brought("brought_tier", tier * block)
        return values

    def _brought(self, name: str, tokens: Int[np.ndarray, " L"]) -> dict[str, float]:
        """Returns what a document's step brings: tokens of a KV head, and bytes of all heads and layers."""
        n_docs, n_heads, n_steps = next(iter(self.steps.values())).slot.shape[:3]
        step = float(tokens.sum()) / (n_docs * (n_steps - tiers.STEPS))
        row_bytes = 2 * self.model.config.head_dim * self.model.dtype.itemsize  # of a key and a value
        return {name: step / (len(tokens) * n_heads), f"{name}_bytes": step * row_bytes}

    def _missed(self, block: int, lines: int, ranked: bool = False) -> Int[np.ndarray, " L"]:
        """Returns the blocks that each layer brings with exact LRU in the steps that count.

        ranked: only those that are neither sinks nor in the window.
        """
        if (block, ranked) not in self.curves:
            self.curves[block, ranked] = np.stack(
                [
                    lru_missed(s, block, self._ranked(s) if ranked else None)[tiers.STEPS :].sum(0)
                    for s in self.steps.values()
                ]
            )
        return self.curves[block, ranked][:, lines]

    def _ranked(self, steps: Steps) -> Bool[np.ndarray, "B K T N"]:
        """Says which of the slots read are neither sinks nor in the window."""
        late = (steps.seen - self.method.window)[:, None]
        return (steps.slot >= self.method.n_sinks) & (steps.slot < late)


def _counted(each: Int[np.ndarray, " T"]) -> int:
    """Returns the sum over the steps that count."""
    return int(each[tiers.STEPS :].sum())


def _rates(name: str, missed: Int[np.ndarray, " L"], read: Int[np.ndarray, " L"]) -> dict[str, Any]:
    """Returns the share of what is read that is not missed, over all layers and in each."""
    return {name: float(1 - missed.sum() / read.sum()), f"{name}_layers": (1 - missed / read).tolist()}
