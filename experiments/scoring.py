"""Scores compressed prompts against the full cache: one dense prefill of some texts serves every method.

A prompt is compressed at its end. What follows it comes on top, for every method alike: prose is read in one
forced pass, so that a method holds the same bytes as another; or it is decoded step by step, as an answer is
after a question, so that methods work as they do in use.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import kvjax
from experiments import passkey
from kvjax import measure, reading, replay, states, text
from kvjax.method import CacheMethod
from kvjax.methods.full import Full
from kvjax.models.decoder import Record
from kvjax.states import State

__all__ = ["Answers", "Prose", "Texts", "compared", "hidden_keys"]

_PIECE = 64  # tokens of prose read at once


@dataclass(frozen=True)
class Prose:
    """Documents whose ends are predicted, with the full cache's predictions."""

    model: kvjax.Model
    pos: Int[Array, "B T"]
    records: tuple[Record, ...]
    rest: Int[np.ndarray, "B N"]
    by_step: bool  # the rest is decoded, else read in one forced pass, without compression or selection
    logits: Float[np.ndarray, "B N V"]  # of the full cache

    @classmethod
    def of(
        cls, model: kvjax.Model, documents: Int[np.ndarray, "B T"], n_rest: int, by_step: bool = False
    ) -> "Prose":
        """Reads documents densely; their last n_rest tokens are what is predicted."""
        prompts = [row[:-n_rest].tolist() for row in documents]
        _, pos, records = replay.record(model, prompts, room=n_rest)
        self = cls(model, pos, records, documents[:, -n_rest:], by_step, np.zeros((0,)))
        return replace(self, logits=self._predicted(self.compressed(Full()), Full())[0])

    def compressed(self, method: CacheMethod) -> State:
        """Returns a method's state of the prompts."""
        return replay.replay(self.model, method, self.records, self.pos, room=self.rest.shape[1])

    def scores(self, method: CacheMethod, state: State) -> tuple[dict[str, Any], State]:
        """Returns the mean KL to the full cache in nats per token, the perplexity, and the top-1 agreement.

        state: of the prompts; it is consumed, and returned as it is after the rest.
        """
        logits, state = self._predicted(state, method)
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
        }, state

    def _predicted(self, state: State, method: CacheMethod) -> tuple[Float[np.ndarray, "B N V"], State]:
        """Returns the logits after each token of the rest, and the state."""
        if not self.by_step:
            state = states.widen(state, self.model, method, self.rest.shape[1])
        logits, read = [], self._decoded if self.by_step else reading.read
        for start in range(0, self.rest.shape[1], _PIECE):
            part, state = read(self.model, self.rest[:, start : start + _PIECE], method, state)
            logits.append(np.asarray(part, np.float32))
        return np.concatenate(logits, axis=1), state

    @staticmethod
    def _decoded(
        model: kvjax.Model, ids: Int[np.ndarray, "B T"], method: CacheMethod, state: State
    ) -> tuple[Float[Array, "B T V"], State]:
        """Decodes given tokens, and returns the logits after each."""
        before = jnp.zeros((len(ids), model.config.vocab_size), jnp.float32)
        _, last, state, kept = kvjax.decode(model, before, state, method, ids, keep_logits=True)
        return jnp.concatenate([kept[:, 1:], last[:, None]], axis=1), state


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

    def grades(self, where: str, method: CacheMethod) -> tuple[dict[str, int], State | None]:
        """Returns a row's figures, how many keys are found and of how many, and the state, see `right`.

        where: what the keys are hidden in.
        """
        right, state = self.right(method)
        return {f"passkey_{where}": sum(right), f"passkey_{where}_of": len(right)}, state

    def right(self, method: CacheMethod) -> tuple[list[bool], State | None]:
        """Returns for each text whether its key is found by a method that did not see the question.

        Also returns the state after the answers, None where there are no texts.
        """
        if not self.keys:
            return [], None
        question = self.model.tokenizer.encode(passkey.QUESTION, bos=False)
        n = len(question) + passkey.N_ANSWER
        state = replay.replay(self.model, method, self.records, self.pos, room=n)
        forced = np.full((len(self.keys), n), -1, np.int32)
        forced[:, : len(question)] = question
        logits = jnp.zeros((len(self.keys), self.model.config.vocab_size), jnp.float32)
        tokens, _, state, _ = kvjax.decode(self.model, logits, state, method, forced)
        drawn = np.asarray(tokens)[:, len(question) :]
        answers = [self.model.tokenizer.decode(row[row >= 0].tolist()) for row in drawn]
        return [passkey.graded(a, key) for a, key in zip(answers, self.keys, strict=True)], state


@dataclass(eq=False)
class Texts:
    """What methods are scored on, each part read when it is first needed.

    Args:
        settings: an experiment's: `rest`, and for pass keys `keys`, `novel_keys`, `key_context`, `texts` and
            `seed`.
        documents: returns those that are scored.
        by_step: see `Prose`.
    """

    model: kvjax.Model
    settings: Any
    documents: Callable[[], Int[np.ndarray, "B T"]]
    by_step: bool = False

    @functools.cached_property
    def prose(self) -> Prose:
        """The documents."""
        return Prose.of(self.model, self.documents(), self.settings.rest, self.by_step)

    @functools.cached_property
    def filler(self) -> Answers:
        """Keys in filler."""
        return Answers.of(self.model, *hidden_keys(self.model, *self._keys(self.settings.keys)))

    @functools.cached_property
    def novel(self) -> Answers:
        """Keys in a text that the full cache finds, the first so many of three times as many."""
        n, right = self.settings.novel_keys, []
        if not n:
            return Answers.of(self.model, [], [])
        contexts, keys = hidden_keys(self.model, *self._keys(3 * n), self.settings.texts[0])
        for part in (slice(start, start + n) for start in range(0, len(keys), n)):
            right += Answers.of(self.model, contexts[part], keys[part]).right(Full())[0]
            if sum(right) >= n:
                break
        found = np.flatnonzero(right)[:n]
        return Answers.of(self.model, [contexts[i] for i in found], [keys[i] for i in found])

    def _keys(self, n: int) -> tuple[int, int, int]:
        return n, self.settings.key_context, self.settings.seed


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
