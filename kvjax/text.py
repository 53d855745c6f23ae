"""Takes excerpts of long real text, and text that has no sense."""

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kvjax.models.config import ModelConfig
from kvjax.models.tokenizer import Tokenizer

__all__ = ["PROSE", "check", "documents", "excerpts", "read_text", "uuids"]

PROSE = "pydoc_data.topics"  # 500 KB of reference prose in every Python, though not the same in each


def read_text(source: str) -> str:
    """Returns the prose of `pydoc_data.topics`, or the text of a file.

    Raises:
        ValueError: for a file that is not UTF-8.
        OSError: for a file that cannot be read.
    """
    if source == PROSE:
        from pydoc_data.topics import topics  # half a megabyte, wanted here only

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a text file is UTF-8, got {source!r} ({error}): convert it") from error


def excerpts(ids: Sequence[int], n: int, length: int, seed: int) -> Int[np.ndarray, "N T"]:
    """Returns n excerpts of the text that do not overlap, one from each n-th of it.

    Raises:
        ValueError: where the text is too short.
    """
    part = len(ids) // n
    if part < length:
        raise ValueError(
            f"a text holds all excerpts, got {len(ids)} tokens for {n} of {length}: "
            "take a longer text, fewer docs or a shorter context"
        )
    starts = np.random.default_rng([seed, 0]).integers(0, part - length + 1, n) + part * np.arange(n)
    return np.stack([np.asarray(ids[start : start + length], np.int32) for start in starts])


def documents(
    tokenizer: Tokenizer, sources: Sequence[str], n: int, length: int, seed: int
) -> Int[np.ndarray, "N T"]:
    """Returns n excerpts, as evenly from several texts as n allows, those of the first text first.

    Raises:
        ValueError: for fewer documents than texts, or a text that is too short.
        OSError: for a file that cannot be read.
    """
    if not 1 <= len(sources) <= n:
        raise ValueError(f"each text gives a document, got {len(sources)} texts for {n}: take more documents")
    counts = [n // len(sources) + (i < n % len(sources)) for i in range(len(sources))]
    read = (tokenizer.encode(read_text(source)) for source in sources)
    return np.concatenate([excerpts(ids, m, length, seed) for ids, m in zip(read, counts, strict=True)])


def uuids(tokenizer: Tokenizer, n: int, length: int, seed: int) -> Int[np.ndarray, "N T"]:
    """Returns n documents of random UUIDs (RFC 9562, version 4), one on a line.

    Example:
        >>> import kvjax
        >>> model = kvjax.load("smollm2-135m")
        >>> model.tokenizer.decode(uuids(model.tokenizer, 1, 27, seed=0)[0].tolist())
        '2516ac85-e2eb-45e3-8cdb-31fe689'
    """
    rng, ids = np.random.default_rng([seed, 1]), []
    while len(ids) < n * length:
        lines = (f"{uuid.UUID(bytes=rng.bytes(16), version=4)}\n" for _ in range(64))
        ids += tokenizer.encode("".join(lines))
    return np.asarray(ids[: n * length], np.int32).reshape(n, length)


def check(documents: Sequence[Sequence[int]] | Int[np.ndarray, "N T"], config: ModelConfig) -> None:
    """Raises ValueError for documents that a model cannot read."""
    ids, longest = np.concatenate([np.asarray(row) for row in documents]), max(map(len, documents))
    context, vocab = config.context_length, config.vocab_size
    if longest > context or ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(
            f"documents fit the context of {context} and the vocabulary of {vocab}, got {longest} tokens in "
            f"{ids.min()}..{ids.max()}: cut them, or encode anew"
        )
