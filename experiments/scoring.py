"""Scores compressed prompts against the full cache: one dense prefill of some texts serves every method.

A prompt is compressed at its end, and what follows it comes on top, for every method alike: prose is read
in one forced pass, and an answer is drawn after a question. So a method holds the same bytes as another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import kvjax
from experiments import passkey
from kvjax import loop, measure, replay, text
from kvjax.loop import State
from kvjax.method import CacheMethod
from kvjax.methods.full import Full
from kvjax.models.decoder import Record

__all__ = ["Answers", "Prose", "compared", "hidden_keys"]

_PIECE = 64  # tokens of prose read at once


@dataclass(frozen=True)
class Prose:
    """Documents whose ends are predicted, with the full cache's predictions."""

    model: kvjax.Model
    pos: Int[Array, "B T"]
    records: tuple[Record, ...]
    rest: Int[np.ndarray, "B N"]
    logits: Float[np.ndarray, "B N V"]  # of the full cache

    @classmethod
    def of(cls, model: kvjax.Model, documents: Int[np.ndarray, "B T"], n_rest: int) -> "Prose":
        """Reads documents densely; their last n_rest tokens are what is predicted."""
        prompts = [row[:-n_rest].tolist() for row in documents]
        _, pos, records = replay.record(model, prompts, room=n_rest)
        self = cls(model, pos, records, documents[:, -n_rest:], np.zeros((0,)))
        return cls(model, pos, records, self.rest, self._predicted(self.compressed(Full()), Full()))

    def compressed(self, method: CacheMethod) -> State:
        """Returns a method's state of the prompts."""
        return replay.replay(self.model, method, self.records, self.pos, room=self.rest.shape[1])

    def scores(self, method: CacheMethod, state: State) -> dict[str, Any]:
        """Returns the mean KL to the full cache in nats per token, the perplexity, and the top-1 agreement.

        state: of the prompts; it is consumed.
        """
        logits = self._predicted(state, method)
        nll = [
            measure.nll(jnp.asarray(a[:-1]), jnp.asarray(b[1:]))
            for a, b in zip(logits, self.rest, strict=True)
        ]
        kl, top1 = compared(self.logits, logits)
        return {
            "kl": max(0.0, float(kl.mean())),
            "kl_documents": kl.mean(1).tolist(),
            "perplexity": float(np.exp(np.mean(nll))),
            "top1": top1,
        }

    def _predicted(self, state: State, method: CacheMethod) -> Float[np.ndarray, "B N V"]:
        """Returns the logits after each token of the rest."""
        logits, state = [], loop.widen(state, self.model, method, self.rest.shape[1])
        for start in range(0, self.rest.shape[1], _PIECE):
            part, state = loop.read(self.model, self.rest[:, start : start + _PIECE], method, state)
            logits.append(np.asarray(part, np.float32))
        return np.concatenate(logits, axis=1)


def compared(
    full: Float[np.ndarray, "B N V"], logits: Float[np.ndarray, "B N V"]
) -> tuple[Float[np.ndarray, "B N"], float]:
    """Returns KL(full ‖ logits) in nats, and the share of places where both prefer the same token."""
    pairs = [(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(full, logits, strict=True)]
    return np.stack([measure.kl(*p) for p in pairs]), float(
        np.mean([measure.top1_agreement(*p) for p in pairs])
    )


@dataclass(frozen=True)
class Answers:
    """Texts that hide a pass key, read densely, and the question that comes after."""

    model: kvjax.Model
    pos: Int[Array, "B T"]
    records: tuple[Record, ...]
    keys: tuple[str, ...]

    @classmethod
    def of(cls, model: kvjax.Model, contexts: Sequence[Sequence[int]], keys: Sequence[str]) -> "Answers":
        """Reads texts densely."""
        if not contexts:
            return cls(model, jnp.zeros((0, 0), jnp.int32), (), ())
        _, pos, records = replay.record(model, contexts, room=64)
        return cls(model, pos, records, tuple(keys))

    def right(self, method: CacheMethod) -> list[bool]:
        """Returns for each text whether its key is found by a method that did not see the question."""
        if not self.keys:
            return []
        question = self.model.tokenizer.encode(passkey.QUESTION, bos=False)
        n = len(question) + passkey.N_ANSWER
        state = replay.replay(self.model, method, self.records, self.pos, room=n)
        forced = np.full((len(self.keys), n), -1, np.int32)
        forced[:, : len(question)] = question
        logits = jnp.zeros((len(self.keys), self.model.config.vocab_size), jnp.float32)
        tokens, *_ = kvjax.decode(self.model, logits, state, method, forced)
        drawn = np.asarray(tokens)[:, len(question) :]
        answers = [self.model.tokenizer.decode(row[row >= 0].tolist()) for row in drawn]
        return [passkey.graded(a, key) for a, key in zip(answers, self.keys, strict=True)]


def hidden_keys(
    model: kvjax.Model, n: int, n_tokens: int, seed: int, source: str | None = None
) -> tuple[list[list[int]], list[str]]:
    """Returns n texts that hide a key at the depths of `passkey`, in filler or in a text; and the keys.

    Raises:
        ValueError: where a text is too short.
    """
    encode = model.tokenizer.encode
    keys = [key for i in range(-(-n // len(passkey.DEPTHS))) for key in passkey.keys(seed + i)][:n]
    depths = [passkey.DEPTHS[i % len(passkey.DEPTHS)] for i in range(n)]
    if source is None:
        return [passkey.context(model.tokenizer, *x, n_tokens) for x in zip(keys, depths, strict=True)], keys
    hints = [encode(passkey.HINT.format(key=key), bos=False) for key in keys]
    task = encode(passkey.TASK)
    longest = max(map(len, hints))
    prose = text.excerpts(encode(text.read_text(source)), n, n_tokens - len(task) - longest, seed)
    cuts = [round(depth * prose.shape[1]) for depth in depths]
    rows = zip(prose.tolist(), cuts, hints, strict=True)
    return [[*task, *row[:cut], *hint, *row[cut:]] for row, cut, hint in rows], keys
