"""Hides a pass key in filler, asks for it, and grades the answer by its digits."""

import re

import numpy as np

from kvjax.models.tokenizer import Tokenizer

__all__ = ["DEPTHS", "HINT", "N_ANSWER", "QUESTION", "TASK", "context", "graded", "keys"]

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # share of the filler before the key
QUESTION = "\nWhat is the pass key? The pass key is"
N_ANSWER = 8  # tokens: a space, five digits, and what follows
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
HINT = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def keys(seed: int) -> tuple[str, ...]:
    """Returns a fresh key of five digits for each depth."""
    return tuple(str(key) for key in np.random.default_rng([seed, 1]).integers(10_000, 100_000, len(DEPTHS)))


def context(tokenizer: Tokenizer, key: str, depth: float, n_tokens: int) -> list[int]:
    """Returns the ids of a text that hides the key, as long as whole sentences of filler allow.

    Raises:
        ValueError: where n_tokens hold no filler.
    """

    def text(n: int) -> str:
        before = round(n * depth)
        return TASK + FILLER * before + HINT.format(key=key) + FILLER * (n - before)

    empty = len(tokenizer.encode(text(0)))
    n = (n_tokens - empty) // len(tokenizer.encode(FILLER))
    while n > 0 and len(tokenizer.encode(text(n))) > n_tokens:
        n -= 1
    if n < 1:
        raise ValueError(
            f"a pass-key text has room for filler beside its {empty} tokens, got {n_tokens=}: use more"
        )
    return tokenizer.encode(text(n))


def graded(answer: str, key: str) -> bool:
    """Returns whether the first digits of the answer are the key."""
    digits = re.search(r"\d+", answer)
    return digits is not None and digits[0] == key
