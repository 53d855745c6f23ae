"""Chelsea's quality: a sweep of its settings, and a table of methods at equal slots."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kvjax
from experiments import chelsea_plot, quality_plot, results
from experiments.rows import claims, measured, side_by_side, start
from experiments.scoring import Texts
from kvjax import budget_losses, budgets, measure, spec, text
from kvjax.method import CacheMethod
from kvjax.methods.chelsea import Chelsea
from kvjax.methods.full import Full

__all__ = ["Quality", "Sweep", "quality", "sweep"]

_PEERS = ("streaming_llm", "snapkv", "tova", "knorm", "h2o")
_SWEEP = (
    "", "chunk=64", "chunk=128", "chunk=512", "stride=3", "stride=4", "n_recent=28", "n_recent=124",
    "n_recent=252", "recent=0.25", "recent=0.5", "n_sinks=0", "similarity=l2", "similarity=dot",
    "before_rope=False", "log_n=False", "rounds=8", "rounds=12", "slack=1", "slack=32",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """What to try, one setting at a time beside the defaults.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics.
        docs: documents that are scored; the table is calibrated on others.
        context: tokens of a prompt.
        rest: tokens after it that are predicted.
        keeps: shares of the prompt's slots that are kept.
        settings: of Chelsea, such as chunk=32; "" are the defaults.
        calibrated: budgets are a table made from other documents with the same settings; else uniform.
        seed: chooses the documents.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 6
    context: int = 2048
    rest: int = 256
    keeps: tuple[float, ...] = (0.25, 0.2)
    settings: tuple[str, ...] = _SWEEP
    calibrated: bool = False
    seed: int = 0
    out: Path = results.FOLDER


@dataclass(frozen=True)
class Quality:
    """What to compare at equal slots.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics; the first also hides pass keys.
        docs: documents that are scored.
        calibration: other documents, which the table of budgets is made from.
        context: tokens of a prompt.
        rest: tokens after it that are predicted.
        keeps: shares of the prompt's slots that are kept.
        methods: beside Chelsea with uniform and with calibrated budgets, such as snapkv:window=16.
        refine: rounds that refine the table of budgets (`kvjax.budget_losses`); 0 leaves such rows out.
        refined: methods that are given the refined table too, for it might be what helps.
        keys: pass keys in filler.
        novel_keys: pass keys in the first text, of those that the full cache finds.
        key_context: tokens of a text that hides a key.
        seed: chooses documents and keys.
        workers: rows that are measured side by side.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 12
    calibration: int = 6
    context: int = 2048
    rest: int = 256
    keeps: tuple[float, ...] = (0.5, 0.25, 0.2, 0.1)
    methods: tuple[str, ...] = _PEERS
    refine: int = 2
    refined: tuple[str, ...] = ("snapkv", "h2o")
    keys: int = 30
    novel_keys: int = 25
    key_context: int = 1024
    seed: int = 0
    workers: int = 1
    out: Path = results.FOLDER


def sweep(settings: Sweep) -> int:
    """Scores each setting that is not stored yet, prints the rows and draws them."""
    stored = start("chelsea", "sweep", settings)
    model = kvjax.load(settings.model, settings.dtype)
    documents = functools.cache(lambda: _documents(model, settings, min(settings.docs, 6)))
    texts = Texts(model, settings, lambda: documents()[0])

    def scores(method: Chelsea, keep: float) -> dict[str, Any]:
        jax.clear_caches()  # programs of one row serve no other, and would pile up
        if settings.calibrated:
            shares = budgets.calibrate(model, documents()[1][:, : settings.context], keep, method)
            table = shares.table(method.budget, method.least)
            method = dataclasses.replace(method, budget=table)
        return texts.prose.scores(method, texts.prose.compressed(method))[0]

    for keep, words in ((k, w) for k in settings.keeps for w in settings.settings):
        method = spec.parse(f"chelsea:{words}", budget=round(keep * settings.context))
        row = {"name": "chelsea", "setting": words, "keep": keep, "spec": repr(method)}
        stored = measured(stored, row, lambda m=method, k=keep: scores(m, k))
    chelsea_plot.draw_sweep(stored.rows, stored.path.with_suffix(".png"))
    print(stored.path)
    return 0


def quality(settings: Quality) -> int:
    """Scores each method at each share that is not stored yet, prints the rows and draws them."""
    stored = start("chelsea", "quality", settings)
    tried = _Tried(settings, kvjax.load(settings.model, settings.dtype))
    full = {"name": "full", "keep": 1.0, "spec": "Full()"}
    stored = measured(stored, full, lambda: tried.figures(Full(), Full()))
    for keep, refined in ((k, r) for r in (False, True) for k in settings.keeps):
        rows = list(tried.rows(keep, refined))
        if any(stored.find(row) is None for row, _ in rows):
            tried.prepare(keep, refined)
        stored = side_by_side(stored, rows, settings.workers)
    stored = stored.claim(claims(settings.model, stored.rows, "keep"))
    picture = stored.path.with_suffix(".png")
    quality_plot.draw(stored.rows, picture, "keep", "slots kept, share of the prompt")
    print(stored.path)
    return 0


@dataclass(eq=False)
class _Tried:
    """What methods are tried on, read when it is first needed."""

    settings: Quality
    model: kvjax.Model

    def rows(
        self, keep: float, refined: bool
    ) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
        """Yields what tells each row from all others, and what measures it.

        refined: those with the refined table, which takes longest to make; else the others.
        """
        for name, make in self._refined(keep) if refined else self._methods(keep):
            row = {"name": name, "keep": keep, "spec": repr(Chelsea(1)) if "chelsea" in name else name}
            yield row, functools.partial(self._at_share, make, keep)

    def _methods(self, keep: float) -> Iterator[tuple[str, Callable[[int], CacheMethod]]]:
        """Yields names, and functions of a budget that make the methods."""
        for name in (*self.settings.methods, "chelsea"):
            yield name, lambda budget, name=name: spec.parse(name, budget=budget)
        yield "chelsea, calibrated", self._with_table("chelsea", keep, 0)

    def _refined(self, keep: float) -> Iterator[tuple[str, Callable[[int], CacheMethod]]]:
        if self.settings.refine:
            for name in (*self.settings.refined, "chelsea"):
                yield f"{name}, refined", self._with_table(name, keep, self.settings.refine)

    def _with_table(self, name: str, keep: float, n_rounds: int) -> Callable[[int], CacheMethod]:
        def make(budget: int) -> CacheMethod:
            table = self.shares(keep, n_rounds).table(budget, Chelsea(budget).least)
            return spec.parse(name, budget=table)

        return make

    @functools.cache  # noqa: B019  lives as long as the run
    def shares(self, keep: float, n_rounds: int) -> budgets.Shares:
        """Calibrates on documents that are not scored."""
        documents = self.documents[1]
        if not n_rounds:
            return budgets.calibrate(self.model, documents[:, : self.settings.context], keep)
        pooled, n_rest = self.shares(keep, 0), self.settings.rest
        return budget_losses.refine(self.model, documents, pooled, n_rounds, n_rest=n_rest)

    @functools.cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        return _documents(self.model, self.settings, self.settings.calibration)

    @functools.cached_property
    def texts(self) -> Texts:
        return Texts(self.model, self.settings, lambda: self.documents[0])

    def prepare(self, keep: float, refined: bool) -> None:
        """Reads and calibrates what the rows of a share have in common."""
        _ = self.texts.prose, self.texts.filler, self.texts.novel
        self.shares(keep, self.settings.refine if refined else 0)

    def _at_share(self, make: Callable[[int], CacheMethod], keep: float) -> dict[str, Any]:
        """Returns the figures of a method that keeps a share."""
        sizes = (self.settings.context, self.settings.key_context)
        figures = self.figures(*(make(round(keep * n)) for n in sizes))
        jax.clear_caches()  # programs of one row serve no other, and would pile up
        return figures

    def figures(self, method: CacheMethod, short: CacheMethod) -> dict[str, Any]:
        """Returns the figures of a row.

        short: the method at the same share of the texts that hide a key.
        """
        prose = self.texts.prose
        state = prose.compressed(method)
        values = {"bytes_held": measure.nbytes(state) // len(prose.rest)}
        values |= prose.scores(method, state)[0]
        for where, answers in (("filler", self.texts.filler), ("novel", self.texts.novel)):
            values |= answers.grades(where, short)[0]
        return values


def _documents(
    model: kvjax.Model, settings: Sweep | Quality, n_other: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the documents that are scored and n_other others, in turn from all over the texts."""
    length = settings.context + settings.rest
    found = text.documents(model.tokenizer, settings.texts, 2 * settings.docs, length, settings.seed)
    scored, other = found[::2], found[1::2]
    if n_other > len(other):
        raise ValueError(
            f"a table is made from at most as many documents as are scored, got {n_other} others"
        )
    return scored, other[np.linspace(0, len(other) - 1, n_other).astype(int)]
