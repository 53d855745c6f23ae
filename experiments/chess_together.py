"""What activation sparsity and cache methods lose together: the KL to the dense model with the full cache."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import kvjax
from experiments import results
from experiments.rows import check_apart, measured, start
from experiments.scoring import Prose
from kvjax import measure, spec, text
from kvjax.calibrate import chess
from kvjax.sparsity import SPARSITIES

__all__ = ["Together", "together"]


@dataclass(frozen=True)
class Together:
    """What to compose. Prompts are compressed at their ends; the tokens after it are what is scored.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics, that are scored.
        learned: text files, or pydoc_data.topics, that thresholds are made from.
        docs: documents that are scored.
        context: tokens of a prompt.
        rest: tokens after it that are predicted.
        tokens: that thresholds are made from, in documents of as many tokens as a prompt.
        methods: of activation sparsity, beside none.
        sparsity: the share of activations that are left out.
        caches: cache methods beside the full cache; {budget} is `keep` of the prompt.
        keep: the share of the slots that is kept by methods with a budget.
        seed: chooses the documents.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    learned: tuple[str, ...] = ()
    docs: int = 6
    context: int = 2048
    rest: int = 256
    tokens: int = 32768
    methods: tuple[str, ...] = ("chess", "chess:plus=True")
    sparsity: float = 0.5
    caches: tuple[str, ...] = ("chelsea:budget={budget}", "kivi8", "kivi4")
    keep: float = 0.5
    seed: int = 0
    out: Path = results.FOLDER


def together(settings: Together) -> int:
    """Scores each pair that is not stored yet, prints the rows and claims their figures.

    Raises:
        ValueError: where text is scored that thresholds are made from, or there is none to make them from.
    """
    check_apart("thresholds", settings)
    names = ("dense", *settings.methods)
    for name in settings.methods:
        spec.parse(name, SPARSITIES, sparsity=settings.sparsity)
    tried, stored = (
        _Tried(settings, kvjax.load(settings.model, settings.dtype)),
        start("chess", "together", settings),
    )
    for name in names:
        for cache in ("full", *settings.caches):
            row = {"name": name, "cache": cache}
            stored = measured(stored, row, functools.partial(tried.figures, name, cache))
            kl, label = stored.find(row)["kl"], cache.partition(":")[0]
            stored = stored.claim({f"{settings.model.split('-')[0]}.{name}.{label}.kl": kl})
    print(stored.path)
    return 0


@dataclass(eq=False)
class _Tried:
    """What pairs are tried on, read when it is first needed."""

    settings: Together
    model: kvjax.Model

    @functools.cached_property
    def documents(self) -> np.ndarray:
        s = self.settings
        return text.documents(self.model.tokenizer, s.texts, s.docs, s.context + s.rest, s.seed)

    @functools.cached_property
    def models(self) -> dict[str, kvjax.Model]:
        s = self.settings
        learned = text.documents(self.model.tokenizer, s.learned, s.tokens // s.context, s.context, s.seed)
        methods = [spec.parse(name, SPARSITIES, sparsity=s.sparsity) for name in s.methods]
        found = chess.closed_form(chess.Passes(self.model, learned), methods)
        sparse = {name: t.apply(self.model) for name, t in zip(s.methods, found, strict=True)}
        return {"dense": self.model, **sparse}

    @functools.cached_property
    def prose(self) -> dict[str, Prose]:
        """The documents as each model reads them, scored against the dense one."""
        n = self.settings.rest
        dense = Prose.of(self.model, self.documents, n)
        return {
            name: dense if name == "dense" else replace(Prose.of(m, self.documents, n), logits=dense.logits)
            for name, m in self.models.items()
        }

    def figures(self, name: str, cache: str) -> dict[str, Any]:
        """Returns a row's figures."""
        s, prose = self.settings, self.prose[name]
        method = spec.parse(cache.format(budget=round(s.keep * s.context)))
        state = prose.compressed(method)
        held = measure.nbytes(state) // s.docs
        return {"spec": repr(method), "bytes_held": held, **prose.scores(method, state)[0]}
