"""Lays out the batch that every method is tried on: rows of prose, then pass-key rows.

Each row's prompt is a context and Q question tokens. A row of prose has the first Q tokens of its
continuation in the question's place. What happens after the prompt is data: a token that is forced,
-1 for one that is drawn, -2 for a row that has ended. So both modes run the same program:

    question unseen    the context is compressed, then the question is forced, then the answer drawn
    question seen      context and question are compressed, then the answer is drawn
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from experiments import passkey
from kvjax import text
from kvjax.models.tokenizer import Tokenizer

__all__ = ["Batch", "lay_out"]


@dataclass(frozen=True)
class Batch:
    """Prompts and what is forced after them; the first `n_docs` rows are prose.

    Text is scored from its second token on: the logits of the first are the dense prefill's.
    """

    prompts: tuple[tuple[int, ...], ...]
    unseen: Int[np.ndarray, "B N"]
    seen: Int[np.ndarray, "B N"]
    n_docs: int
    n_question: int
    n_scored: int  # tokens of prose
    keys: tuple[str, ...]

    @property
    def total(self) -> int:
        """Tokens of the longest row: budgets are shares of it."""
        return max(map(len, self.prompts)) - self.n_question + self.unseen.shape[1]

    @property
    def digest(self) -> str:
        """A name for exactly these tokens."""
        text = repr((self.prompts, self.unseen.tolist(), self.keys))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def forced(self, question: str) -> Int[np.ndarray, "B N"]:
        """Returns what is forced after the prompt, the question "seen" or "unseen"."""
        return self.seen if question == "seen" else self.unseen


def lay_out(
    tokenizer: Tokenizer, source: str, *, context: int, continuation: int, docs: int, seed: int
) -> Batch:
    """Returns the batch for a tokenizer and a text, see `text.read_text`.

    Raises:
        ValueError: for sizes that are no sizes, a text that is too short, or a continuation that
            does not go beyond the question.
    """
    if min(context, continuation, docs) < 1:
        raise ValueError(f"sizes are at least 1, got {context=}, {continuation=}, {docs=}: use more")
    question = tokenizer.encode(passkey.QUESTION, bos=False)
    n_question = len(question)
    if continuation < n_question + 2:
        raise ValueError(
            f"a continuation goes beyond the {n_question} tokens of the question, got {continuation=}: "
            f"use at least {n_question + 2}"
        )
    n_steps = max(continuation, n_question + passkey.N_ANSWER)
    ids = tokenizer.encode(text.read_text(source))
    prose = text.excerpts(ids, docs, context + continuation, seed)
    keys = passkey.keys(seed)
    hidden = [
        passkey.context(tokenizer, key, depth, context)
        for key, depth in zip(keys, passkey.DEPTHS, strict=True)
    ]
    return Batch(
        prompts=tuple(tuple(row[: context + n_question].tolist()) for row in prose)
        + tuple((*row, *question) for row in hidden),
        unseen=_filled([row[context:] for row in prose], [question] * len(keys), n_steps),
        seen=_filled([[]] * docs, [[]] * len(keys), n_steps),
        n_docs=docs,
        n_question=n_question,
        n_scored=continuation,
        keys=keys,
    )


def _filled(prose: Sequence[Sequence[int]], asked: Sequence[Sequence[int]], n_steps: int) -> np.ndarray:
    """Returns one row per sequence: its tokens, the answer's -1 where one is asked for, then -2."""
    forced = np.full((len(prose) + len(asked), n_steps), -2, np.int32)
    for row, tokens in zip(forced, [*prose, *asked], strict=True):
        row[: len(tokens)] = tokens
    for row, tokens in zip(forced[len(prose) :], asked, strict=True):
        row[len(tokens) : len(tokens) + passkey.N_ANSWER] = -1
    return forced
