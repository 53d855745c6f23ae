"""Chelsea while decoding: a long text, token by token, against the full cache."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvjax
from experiments import chelsea_plot, results
from experiments.rows import measured, start
from experiments.scoring import compared
from kvjax import spec, text
from kvjax.method import CacheMethod
from kvjax.methods.full import Full

__all__ = ["Long", "long"]


@dataclass(frozen=True)
class Long:
    """A long text, read token by token after a short prompt, so that a method works while decoding.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics.
        docs: rows.
        prompt: tokens of the prompt.
        new: tokens after it.
        budget: slots per KV head.
        methods: beside Chelsea.
        seed: chooses the documents.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 2
    prompt: int = 512
    new: int = 2048
    budget: int = 512
    methods: tuple[str, ...] = ("streaming_llm", "h2o", "tova")
    seed: int = 0
    out: Path = results.FOLDER


def long(settings: Long) -> int:
    """Scores each method that is not stored yet, prints the rows and draws them."""
    stored = start("chelsea", "long", settings)
    model = kvjax.load(settings.model, settings.dtype)
    length = settings.prompt + settings.new

    @functools.cache
    def documents() -> np.ndarray:
        return text.documents(model.tokenizer, settings.texts, settings.docs, length, settings.seed)

    @functools.cache
    def full() -> np.ndarray:
        return _decoded(model, Full(), documents(), settings.prompt)

    for name in ("chelsea", *settings.methods):
        method = spec.parse(name, budget=settings.budget)

        def scores(method: CacheMethod = method) -> dict[str, Any]:
            logits = _decoded(model, method, documents(), settings.prompt)
            kl, top1 = compared(full(), logits)
            spans = np.array_split(kl.mean(0), max(1, settings.new // 256))
            return {
                "kl": float(kl.mean()),
                "kl_spans": [float(x.mean()) for x in spans],
                "top1": top1,
            }

        stored = measured(stored, {"name": name, "budget": settings.budget, "spec": repr(method)}, scores)
    chelsea_plot.draw_long(stored.rows, settings.prompt, settings.new, stored.path.with_suffix(".png"))
    print(stored.path)
    return 0


def _decoded(model: kvjax.Model, method: CacheMethod, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Returns the logits after each token that follows the prompt, read one by one; [B N V]."""
    logits, state = kvjax.prefill(model, ids[:, :prompt], method, room=ids.shape[1] - prompt)
    *_, kept = kvjax.decode(model, logits, state, method, ids[:, prompt:].astype(np.int32), keep_logits=True)
    return np.asarray(kept)
