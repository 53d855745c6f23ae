"""Chelsea's quality: a sweep of its settings, and a table of methods at equal slots."""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvjax
from experiments import chelsea_plot, options, results
from experiments.results import Results
from experiments.scoring import Answers, Prose, hidden_keys
from kvjax import budgets, measure, spec, text
from kvjax.method import CacheMethod
from kvjax.methods.chelsea import Chelsea
from kvjax.methods.full import Full

__all__ = ["Quality", "Sweep", "measured", "quality", "start", "sweep"]

_PEERS = ("streaming_llm", "snapkv", "tova", "knorm", "h2o")
_SWEEP = (
    "", "chunk=32", "chunk=128", "chunk=256", "stride=3", "stride=4", "n_recent=32", "n_recent=128",
    "n_recent=256", "n_sinks=0", "similarity=l2", "similarity=dot", "before_rope=False", "log_n=False",
    "rounds=4", "rounds=12", "slack=1", "slack=64",
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
    keys: int = 30
    novel_keys: int = 25
    key_context: int = 1024
    seed: int = 0
    workers: int = 1
    out: Path = results.FOLDER


def sweep(settings: Sweep) -> int:
    """Scores each setting that is not stored yet, prints the rows and draws them."""
    stored = start("sweep", settings)
    model = kvjax.load(settings.model, settings.dtype)
    documents = functools.cache(lambda: _documents(model, settings, min(settings.docs, 6)))
    prose = functools.cache(lambda: Prose.of(model, documents()[0], settings.rest))

    def scores(method: Chelsea, keep: float) -> dict[str, Any]:
        if settings.calibrated:
            shares = budgets.calibrate(model, documents()[1][:, : settings.context], keep, method)
            table = shares.table(method.budget, method.least)
            method = dataclasses.replace(method, budget=table)
        return prose().scores(method, prose().compressed(method))

    for keep, words in ((k, w) for k in settings.keeps for w in settings.settings):
        method = spec.parse(f"chelsea:{words}", budget=round(keep * settings.context))
        row = {"name": "chelsea", "setting": words, "keep": keep, "spec": repr(method)}
        stored = measured(stored, row, lambda m=method, k=keep: scores(m, k))
    chelsea_plot.draw_sweep(stored.rows, stored.path.with_suffix(".png"))
    print(stored.path)
    return 0


def quality(settings: Quality) -> int:
    """Scores each method at each share that is not stored yet, prints the rows and draws them."""
    stored = start("quality", settings)
    tried = _Tried(settings, kvjax.load(settings.model, settings.dtype))
    rows = [({"name": "full", "keep": 1.0, "spec": "Full()"}, lambda: tried.figures(Full(), Full()))]
    for keep in settings.keeps:
        for name, make in tried.methods(keep):
            row = {"name": name, "keep": keep, "spec": repr(Chelsea(1)) if "chelsea" in name else name}
            rows.append((row, functools.partial(tried.at_share, make, keep)))
    if any(stored.find(row) is None for row, _ in rows):
        tried.prepare()
    with ThreadPoolExecutor(settings.workers) as pool:
        waiting = [(row, None if stored.find(row) else pool.submit(figures)) for row, figures in rows]
        for row, future in waiting:
            stored = measured(stored, row, future and future.result)
    stored = stored.claim(_claims(settings.model.split("-")[0], stored.rows))
    chelsea_plot.draw_quality(stored.rows, stored.path.with_suffix(".png"))
    print(stored.path)
    return 0


@dataclass(eq=False)
class _Tried:
    """What methods are tried on, read when it is first needed."""

    settings: Quality
    model: kvjax.Model

    def methods(self, keep: float) -> Iterator[tuple[str, Callable[[int], CacheMethod]]]:
        """Yields names, and functions of a budget that make the methods."""
        for name in self.settings.methods:
            yield name, lambda budget, name=name: spec.parse(name, budget=budget)
        yield "chelsea", Chelsea
        yield (
            "chelsea, calibrated",
            lambda budget: Chelsea(self.shares(keep).table(budget, Chelsea(budget).least)),
        )

    @functools.cache  # noqa: B019  lives as long as the run
    def shares(self, keep: float) -> budgets.Shares:
        """Calibrates on documents that are not scored."""
        documents = self.documents[1][:, : self.settings.context]
        return budgets.calibrate(self.model, documents, keep)

    @functools.cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        return _documents(self.model, self.settings, self.settings.calibration)

    @functools.cached_property
    def prose(self) -> Prose:
        return Prose.of(self.model, self.documents[0], self.settings.rest)

    @functools.cached_property
    def filler(self) -> Answers:
        return Answers.of(self.model, *hidden_keys(self.model, *self._keys(self.settings.keys)))

    @functools.cached_property
    def novel(self) -> Answers:
        """Keys in a text that the full cache finds, the first so many of three times as many."""
        n, right = self.settings.novel_keys, []
        contexts, keys = hidden_keys(self.model, *self._keys(3 * n), self.settings.texts[0])
        for part in (slice(start, start + n) for start in range(0, len(keys), n)):
            right += Answers.of(self.model, contexts[part], keys[part]).right(Full())
            if sum(right) >= n:
                break
        found = np.flatnonzero(right)[:n]
        return Answers.of(self.model, [contexts[i] for i in found], [keys[i] for i in found])

    def _keys(self, n: int) -> tuple[int, int, int]:
        return n, self.settings.key_context, self.settings.seed

    def prepare(self) -> None:
        """Reads and calibrates what the rows share."""
        _ = self.prose, self.filler, self.novel
        for keep in self.settings.keeps:
            self.shares(keep)

    def at_share(self, make: Callable[[int], CacheMethod], keep: float) -> dict[str, Any]:
        """Returns the figures of a method that keeps a share."""
        sizes = (self.settings.context, self.settings.key_context)
        return self.figures(*(make(round(keep * n)) for n in sizes))

    def figures(self, method: CacheMethod, short: CacheMethod) -> dict[str, Any]:
        """Returns the figures of a row.

        short: the method at the same share of the texts that hide a key.
        """
        state = self.prose.compressed(method)
        values = {"bytes_held": measure.nbytes(state) // len(self.prose.rest)}
        values |= self.prose.scores(method, state)
        return values | {
            "passkey_filler": sum(self.filler.right(short)), "passkey_filler_of": len(self.filler.keys),
            "passkey_novel": sum(self.novel.right(short)), "passkey_novel_of": len(self.novel.keys),
        }  # fmt: skip


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


def start(command: str, settings: Any) -> Results:
    """Opens the results of a command."""
    arguments = map(shlex.quote, options.as_arguments(settings, skip=("out", "workers")))
    words = ["python -m experiments.chelsea", command, *arguments]
    return results.start(f"chelsea_{command}", settings.seed, folder=settings.out, command=" ".join(words))


def measured(stored: Results, row: Mapping[str, Any], figures: Callable[[], dict[str, Any]]) -> Results:
    """Adds a row unless it is stored, and prints it."""
    if stored.find(row) is None:
        stored = stored.add(row, figures())
    found = stored.find(row)
    named = (
        f"{k} {found[k]:.4g}"
        for k in ("kl", "top1", "perplexity", "passkey_filler", "passkey_novel")
        if k in found
    )
    print(*(str(row[k]) for k in row if k != "spec"), *named, sep=" | ", flush=True)
    return stored


def _claims(model: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures that are quoted, `<model>.<method>.<figure>@<share>`."""
    found = {}
    for row in rows:
        name = f"{model}.{row['name'].replace(', ', '_')}"
        found |= {
            f"{name}.{k}@{row['keep']:g}": row[k]
            for k in ("kl", "top1", "perplexity", "passkey_filler", "passkey_novel")
        }
    return found
