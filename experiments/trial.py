"""Tries one method on one dense prefill that all methods share: quality, bytes and times of a row."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import kvjax
from experiments import passkey
from experiments.batch import Batch
from experiments.clock import Span, timed
from experiments.plan import Trial
from kvjax import measure, replay
from kvjax.method import CacheMethod
from kvjax.methods import layers, per_layer
from kvjax.models.decoder import Record
from kvjax.states import State

__all__ = [
    "Outcome",
    "Prefilled",
    "Prompt",
    "capacity",
    "compile_decode",
    "prefilled",
    "read",
    "read_question",
    "run",
]

_CHUNK = 512  # tokens of the prompt read at once


@dataclass(frozen=True)
class Prefilled:
    """The dense prefill of a batch, recorded."""

    model: kvjax.Model
    batch: Batch
    logits: Array  # [B V] after the question
    pos: Array  # [B T]
    records: tuple[Record, ...]
    span: Span

    @property
    def room(self) -> int:
        """Tokens that may follow the prompt."""
        return self.batch.total - self.pos.shape[1]

    def part(self, columns: slice) -> Iterator[Record]:
        """Yields some columns of each layer's record, one layer at a time."""
        for record in self.records:
            yield Record(*(x[:, columns] for x in record))


@dataclass(frozen=True)
class Prompt:
    """A method's state after the prompt, before its compression, and what that took."""

    state: State
    asked: bool  # the question is in it
    run_s: float
    compile_s: float


@dataclass(frozen=True)
class Outcome:
    """A row's figures, and the logits of the prose that it predicted [docs N V]."""

    values: dict
    logits: Array


def prefilled(model: kvjax.Model, batch: Batch) -> Prefilled:
    """Reads the batch densely.

    Raises:
        ValueError: where it does not fit the model's context.
    """
    if batch.total > model.config.context_length:
        raise ValueError(
            f"context and continuation fit the model's context of {model.config.context_length} tokens, "
            f"got {batch.total}: lower them"
        )
    length = max(map(len, batch.prompts))
    with timed() as span:
        n_chunks = -(-length // _CHUNK)
        logits, pos, records = replay.record(
            model, batch.prompts, room=batch.total - length, chunk=-(-length // n_chunks)
        )
        jax.block_until_ready((logits, records))
    return Prefilled(model, batch, logits, pos, records, span)


def capacity(pre: Prefilled, method: CacheMethod) -> tuple:
    """Returns the slots of each layer while the prompt is read; methods alike in it can share that."""
    config, length = pre.model.config, pre.pos.shape[1]
    return tuple(
        tuple(max(s, length) for s in m.slots(layer, pre.batch.total))
        if m.evicts
        else m.slots(layer, pre.batch.total)
        for m, layer in zip(per_layer(method, config), layers(config), strict=True)
    )


def read(pre: Prefilled, method: CacheMethod) -> Prompt:
    """Replays the context to a method."""
    with timed() as span:
        state = jax.block_until_ready(_read(pre, method))
    return Prompt(state, False, span.run_s, span.compile_s)


def read_question(pre: Prefilled, method: CacheMethod, prompt: Prompt) -> Prompt:
    """Replays the question too."""
    n = pre.batch.n_question
    with timed() as span:
        records, pos = pre.part(slice(-n, None)), pre.pos[:, -n:]
        state = replay.read(pre.model, method, records, pos, room=pre.room, state=prompt.state)
        jax.block_until_ready(state)
    return Prompt(state, True, prompt.run_s + span.run_s, prompt.compile_s + span.compile_s)


def _read(pre: Prefilled, method: CacheMethod) -> State:
    n = pre.batch.n_question
    pos = pre.pos[:, :-n]
    return replay.read(
        pre.model,
        method,
        pre.part(slice(None, -n)),
        pos,
        room=pre.room + n,
        later=n,
        chunk=_even(pos.shape[1]),
    )


def _compress(pre: Prefilled, trial: Trial, state: State) -> State:
    """Returns the compressed state; the given one is kept."""
    end = pre.pos.shape[1] - (pre.batch.n_question if trial.question == "unseen" else 0)
    n_queries = max(m.n_queries for m in per_layer(trial.method, pre.model.config))
    tail = slice(max(end - n_queries, 0), end)
    return replay.finish(pre.model, trial.method, state, pre.part(tail), pre.pos[:, tail])


def compile_decode(pre: Prefilled, method: CacheMethod) -> Span:
    """Compiles the program that decodes with a method: it takes no step. Threads may share the work."""
    trial = Trial("", method, 1.0, 0, "unseen")
    with timed() as span:
        shapes = jax.eval_shape(lambda: _compress(pre, trial, _read(pre, method)))
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        jax.block_until_ready(_decode(pre, trial, state, steps=0))
    return span


def run(pre: Prefilled, trial: Trial, prompt: Prompt, reference: Outcome | None) -> Outcome:
    """Compresses, decodes and measures.

    Args:
        prompt: from `read` or `read_question`, as the trial's mode wants; it is kept.
        reference: the full cache's outcome; None where this is it.
    """
    with timed() as compressing:
        state = jax.block_until_ready(_compress(pre, trial, prompt.state))
    steps = passkey.N_ANSWER if trial.question == "seen" else pre.batch.unseen.shape[1]
    with timed() as decoding:
        tokens, _, state, kept = jax.block_until_ready(_decode(pre, trial, state, steps))
    batch = len(pre.batch.prompts)
    methods = per_layer(trial.method, pre.model.config)
    values = {
        "bytes_held": measure.nbytes(state) // batch,
        "bytes_read": measure.bytes_read(state, methods) // batch,
        "replay_s": prompt.run_s + compressing.run_s,
        "decode_step_s": decoding.run_s / steps,
        "compile_s": prompt.compile_s + compressing.compile_s + decoding.compile_s,
        "batch": batch,
    }
    kept = kept[: pre.batch.n_docs, : pre.batch.n_scored]
    quality = _passkey(pre, trial, np.asarray(tokens)) | _prose(pre, trial, kept, reference)
    return Outcome(quality | values, kept)


def _decode(pre: Prefilled, trial: Trial, state: State, steps: int) -> tuple:
    forced = pre.batch.forced(trial.question)
    return kvjax.decode(pre.model, pre.logits, state, trial.method, forced, steps=steps, keep_logits=True)


def _prose(pre: Prefilled, trial: Trial, kept: Array, reference: Outcome | None) -> dict:
    """Scores the predictions of the prose, from the second token on."""
    if trial.question == "seen":
        return {"perplexity": None, "kl": None, "top1": None}
    logits = kept[:, 1:]
    full = logits if reference is None else reference.logits[:, 1:]
    targets = jnp.asarray(pre.batch.unseen[: pre.batch.n_docs, 1 : pre.batch.n_scored])
    return {
        "perplexity": measure.perplexity(logits, targets),
        "kl": max(0.0, float(measure.kl(full, logits).mean())),
        "top1": measure.top1_agreement(full, logits),
    }


def _passkey(pre: Prefilled, trial: Trial, tokens: np.ndarray) -> dict:
    """Grades the answers."""
    start = pre.batch.n_question if trial.question == "unseen" else 0
    drawn = tokens[pre.batch.n_docs :, start : start + passkey.N_ANSWER]
    answers = [pre.model.tokenizer.decode(row[row >= 0].tolist()) for row in drawn]
    found = sum(passkey.graded(answer, key) for answer, key in zip(answers, pre.batch.keys, strict=True))
    return {"passkey": found, "answers": answers, "keys": pre.batch.keys}


def _even(length: int) -> int:
    """Returns a chunk that divides a length with little rest."""
    return -(-length // -(-length // _CHUNK))
