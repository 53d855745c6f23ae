"""A²ATS's quality: what it loses beside methods that read as many bytes a step.

A²ATS chooses a share of the tokens for each query head and reads the union over a group's heads, which is
measured in the very steps that are scored. Others are given the budget with which they read as many bytes,
their own index included, to the nearest page; one page, if their index alone takes more. What each has read
is in its row. Codebooks, which all rows of a batch share, are not among these bytes. A budget counts
generated tokens, here as everywhere: a method that evicts makes room for them.

The rest of each document is decoded step by step, since prompts are read in full.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kvjax
from experiments import quality_plot, results
from experiments.counted import Counted, budget_of, reads
from experiments.rows import claims, measured, side_by_side, start
from experiments.scoring import Texts
from kvjax import spec, text
from kvjax.calibrate import checkpoint, codebooks
from kvjax.method import CacheMethod
from kvjax.methods.a2ats import A2ATS
from kvjax.methods.full import Full

__all__ = ["Quality", "Tried", "quality", "row_of"]

_TEXTS = ("prose", "filler", "novel")
_FULL = {"name": "full", "ratio": 1.0, "spec": "Full()"}


@dataclass(frozen=True)
class Quality:
    """What to compare at equal bytes read.

    Args:
        calibration: a folder of `kvjax calibrate a2ats`.
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics, none that the codebooks were made from; the first also hides
            pass keys.
        docs: documents that are scored.
        context: tokens of a prompt.
        rest: tokens after it that are predicted.
        ratios: shares of the tokens that each query head of A²ATS chooses.
        methods: beside it, such as snapkv:window=16; each with a budget.
        keys: pass keys in filler.
        novel_keys: pass keys in the first text, of those that the full cache finds.
        key_context: tokens of a text that hides a key.
        seed: chooses documents and keys.
        workers: rows that are measured side by side.
        out: the folder of results.
    """

    calibration: Path
    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 8
    context: int = 2048
    rest: int = 256
    ratios: tuple[float, ...] = (0.015, 0.03, 0.06, 0.12)
    methods: tuple[str, ...] = ("quest", "snapkv")
    keys: int = 30
    novel_keys: int = 25
    key_context: int = 1024
    seed: int = 0
    workers: int = 1
    out: Path = results.FOLDER


def quality(settings: Quality) -> int:
    """Scores each method at each ratio that is not stored yet, prints the rows and draws them."""
    for name in settings.methods:
        spec.parse(name, budget=1)
        if "budget" not in spec.settings_of(name):
            raise ValueError(f"a method is given as many bytes by its budget, got {name!r}: leave it out")
    model = kvjax.load(settings.model, settings.dtype)
    for name in settings.methods:  # what will fail, fails before the first row
        budget_of(name, 0, model, min(settings.context, settings.key_context))
    books = codebooks.load(settings.calibration, model)
    methods = [A2ATS(ratio, books, window=books.window, far=books.far) for ratio in settings.ratios]
    tried = Tried(settings, model)
    stored = measured(start("a2ats", "quality", settings), _FULL, lambda: tried.figures(lambda where: Full()))
    full, others = stored.find(_FULL), []
    own = [(row_of(m), functools.partial(tried.figures, lambda where, m=m: m, full)) for m in methods]
    stored = side_by_side(stored, own, settings.workers)
    for row, name in ((row, name) for row, _ in own for name in settings.methods):
        make = functools.partial(tried.alike, name, stored.find(row), full)
        others.append((row | {"name": name, "spec": name}, functools.partial(tried.figures, make, full)))
    stored = side_by_side(stored, others, settings.workers)
    rows = [full, *(stored.find(row) for row, _ in (*own, *others))]
    stored = stored.claim(claims(settings.model, rows, "ratio"))
    label = "bytes read in a decode step, share of the full cache's"
    quality_plot.draw(rows, stored.path.with_suffix(".png"), "read", label)
    print(stored.path)
    return 0


def row_of(method: A2ATS) -> dict[str, Any]:
    """Returns the settings of a row; those of methods that read as much name the calibration too."""
    books, words = method.calibration, ("topk", "window", "n_sinks", "far")
    return {
        "name": "a2ats",
        "ratio": method.topk,
        "spec": "a2ats:" + ",".join(f"{word}={getattr(method, word)}" for word in words),
        "calibration": {
            "digest": checkpoint.digest(*map(np.asarray, (books.centroids, books.metric))),
            "model": books.model,
            "centroids": books.centroids.shape[2],
            "dense_layers": [i for i, flat in enumerate(books.flat) if flat],
        },
    }


@dataclass(eq=False)
class Tried:
    """What methods are tried on, read when it is first needed.

    Args:
        settings: an experiment's, as `Quality` has them, but those of A²ATS.
    """

    settings: Any
    model: kvjax.Model
    reading: threading.Lock = field(default_factory=threading.Lock)

    @functools.cached_property
    def texts(self) -> Texts:
        return Texts(self.model, self.settings, self._documents, by_step=True)

    def part(self, where: str) -> Any:
        """Returns one of `_TEXTS`, read once, whichever row is first."""
        with self.reading:
            return getattr(self.texts, where)

    def _documents(self) -> np.ndarray:
        s = self.settings
        return text.documents(self.model.tokenizer, s.texts, s.docs, s.context + s.rest, s.seed)

    def alike(self, name: str, like: Mapping[str, Any], full: Mapping[str, Any], where: str) -> CacheMethod:
        """Returns a method that reads as many bytes of a text as A²ATS has read.

        like: A²ATS's row. full: the full cache's, which says how many tokens a step sees.
        """
        seen = int(full[_at("tokens", where)])
        wanted = like[_at("bytes_read", where)]
        return spec.parse(name, budget=budget_of(name, wanted, self.model, seen))

    def figures(
        self, make: Callable[[str], CacheMethod], full: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the figures of a row.

        Args:
            make: returns the method for one of `_TEXTS`.
            full: the full cache's row, None where this is it.
        """
        values = {}
        for where in _TEXTS:
            part = self.part(where)
            if where != "prose" and not part.keys:
                continue
            method = make(where)
            scores, read = self._scored(where, Counted(method))
            values |= scores | {_at(k, where): read[k] for k in ("tokens", "bytes_read")}
            if budget := getattr(method, "budget", None):
                values[_at("budget", where)] = budget
            if where == "prose":
                values |= {k: read[k] for k in ("tokens_layers", "bytes_shared")}
        jax.clear_caches()  # programs of one row serve no other, and would pile up
        return values | {"read": values["bytes_read"] / (full or values)["bytes_read"]}

    def _scored(self, where: str, method: Counted) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what a method finds or loses in a text, and what its steps read."""
        part = self.part(where)
        if where == "prose":
            values, state = part.scores(method, part.compressed(method))
        else:
            values, state = part.grades(where, method)
        return values, reads(state, method, self.model)


def _at(name: str, where: str) -> str:
    """Names a figure of a text; those of prose have no ending."""
    return name if where == "prose" else f"{name}_{where}"
