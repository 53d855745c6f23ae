"""Continues prompts: text or token ids in, text out."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from kvjax.decoding import decode
from kvjax.disk import Disk
from kvjax.method import CacheMethod
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.reading import pad, prefill
from kvjax.sampling import Sampling
from kvjax.states import State
from kvjax.thresholds import Thresholds

__all__ = ["Completion", "generate", "stream"]

_FIRST = 8  # tokens of the first compiled call, so that a reader sees some soon; each has twice as many
_BLOCK = 64  # up to so many, so that what a call costs beside its steps is little


@dataclass(frozen=True)
class Completion:
    """One continuation. finish: "stop" (a stop token was drawn) or "length"."""

    text: str
    ids: tuple[int, ...]
    finish: str


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]] | str,
    method: CacheMethod = Full(),  # noqa: B008  frozen
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008
    compress: str = "end",
    sparsity: Thresholds | None = None,
    state: State | None = None,
) -> list[Completion]:
    """Continues a batch of prompts of any lengths.

    Args:
        method: how the KV cache is held; `chain` composes several.
        compress: "end" or "chunk", see `prefill`.
        sparsity: which activations are left out, such as `Chess.load(folder, model)`. To serve many prompts,
            apply it once: `sparsity.apply(model)` is a model like others.
        state: what was read before the prompts, with the same method, such as `load_context(...).state`; it
            is consumed.

    Raises:
        ValueError: for an empty prompt, ids outside the vocabulary, a prompt that leaves no room
            in the model's context or in the state, another number of prompts than the state has rows, or
            max_new_tokens below 1.

    Example:
        >>> import kvjax
        >>> model = kvjax.load("smollm2-135m")
        >>> kvjax.generate(model, "The capital of France is", max_new_tokens=2)[0].text
        ' Paris.'
    """
    rows: list[list[int]] = []
    stops = _stops(model, sampling).stop
    steps = stream(
        model,
        prompts,
        method,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        compress=compress,
        sparsity=sparsity,
        state=state,
    )
    for step in steps:
        rows = rows or [[] for _ in step]
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    done = []
    for row in rows:
        ended = bool(row) and row[-1] in stops
        ids = row[:-1] if ended else row
        text = model.tokenizer.decode(ids) if model.tokenizer else ""
        done.append(Completion(text, tuple(ids), "stop" if ended else "length"))
    return done


def stream(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]] | str,
    method: CacheMethod = Full(),  # noqa: B008
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008
    compress: str = "end",
    sparsity: Thresholds | None = None,
    state: State | None = None,
) -> Iterator[list[int | None]]:
    """Yields the tokens of each step, one per row, None where a row has ended.

    Arguments and errors as `generate`. Tokens arrive in blocks that grow, since many steps run in one
    compiled call.

    Example:
        >>> import kvjax
        >>> model = kvjax.load("smollm2-135m")
        >>> for step in kvjax.stream(model, "The capital of France is", max_new_tokens=2):
        ...     print(repr(model.tokenizer.decode(step)))
        ' Paris'
        '.'
    """
    if max_new_tokens < 1:
        raise ValueError(f"at least one token is generated, got {max_new_tokens=}")
    model = model if sparsity is None else sparsity.apply(model)
    ids = pad(_encode(model, prompts, begins=state is None))
    if state is not None and len(ids) != len(state[0].seen):
        raise ValueError(f"each row of a state has a prompt, got {len(ids)} for {len(state[0].seen)} rows")
    logits, state = prefill(model, ids, method, room=max_new_tokens, compress=compress, state=state)
    return _blocks(model, logits, state, method, max_new_tokens, _stops(model, sampling))


def _blocks(
    model: Model, logits: jax.Array, state: State, method: CacheMethod, left: int, sampling: Sampling
) -> Iterator[list[int | None]]:
    """Decodes block by block until all rows have ended, and then lets the folder of a state on disk go."""
    folder, forced, block = Disk.of(state), np.full((logits.shape[0], _BLOCK), -1, np.int32), _FIRST
    try:
        while left and not (forced == -2).all():
            steps, block = min(block, left), min(2 * block, _BLOCK)
            tokens, logits, state, _ = decode(
                model, logits, state, method, forced, steps=steps, sampling=sampling
            )
            tokens = np.asarray(tokens)[:, :steps]
            for column in tokens.T:
                if (column >= 0).any():
                    yield [int(t) if t >= 0 else None for t in column]
            left -= steps
            ended = (tokens[:, -1:] < 0) | np.isin(tokens[:, -1:], sampling.stop)
            forced = np.where(ended, -2, forced)
    finally:
        if folder is not None:
            folder.close()


def _stops(model: Model, sampling: Sampling) -> Sampling:
    """Fills in the model's own stop tokens."""
    if sampling.stop is not None:
        return sampling
    return dataclasses.replace(sampling, stop=tuple(model.tokenizer.stop_ids) if model.tokenizer else ())


def _encode(model: Model, prompts: Sequence, *, begins: bool) -> list[list[int]]:
    """Returns the token ids of every prompt, none of them empty.

    begins: nothing comes before; else a text has no first token, which a chat template may have written.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if any(isinstance(p, str) for p in prompts) and model.tokenizer is None:
        raise ValueError("text needs a tokenizer, got a model without one: give token ids")
    try:
        rows = [
            _ids(model, p, begins) if isinstance(p, str) else list(map(operator.index, p)) for p in prompts
        ]
    except TypeError as error:
        raise ValueError(f"prompts are texts, or rows of token ids, got others: {error}") from error
    if any(t < 0 for row in rows for t in row):
        raise ValueError(f"token ids are at least 0, got {min(t for row in rows for t in row)}")
    empty = [i for i, row in enumerate(rows) if not row]
    if empty or not rows:
        raise ValueError(f"a prompt has at least one token, got none in prompts {empty}")
    return rows


def _ids(model: Model, text: str, begins: bool) -> list[int]:
    if begins:
        return model.tokenizer.encode(text)
    ids = model.tokenizer.encode(text, bos=False)
    return ids[1:] if ids and ids[0] == model.tokenizer.bos_id else ids
