"""The commands `kvjax calibrate ...`: what a method needs to know of a model, found from text and stored."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvjax
from kvjax import budget_losses, budgets, spec, text
from kvjax.calibrate import a2ats, chess
from kvjax.model import Model
from kvjax.sparsity import SPARSITIES

__all__ = ["A2ats", "Budgets", "Calibrate", "Chess", "check_tokenizer"]


@dataclass(frozen=True)
class Budgets:
    """Finds the share of the slots that each KV head needs (Chelsea), and writes it to a file.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        keep: the share of a document's slots that is kept.
        text: pydoc_data.topics (prose that every Python has), or text files.
        docs: documents, of all texts alike.
        context: tokens of a document; the length that is to be served is best.
        refine: rounds that move slots to the heads that lose most without them; 0 looks at keys alone.
        seed: chooses the documents.
        out: the file.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    keep: float = 0.25
    text: tuple[str, ...] = (text.PROSE,)
    docs: int = 6
    context: int = 2048
    refine: int = 0
    seed: int = 0
    out: Path = Path("budgets.json")

    def run(self) -> None:
        """Writes the file, and where the slots go."""
        model = kvjax.load(self.model, self.dtype)
        check_tokenizer(model)
        n_rest = budget_losses.N_REST if self.refine else 0
        documents = text.documents(model.tokenizer, self.text, self.docs, self.context + n_rest, self.seed)
        shares = budgets.calibrate(model, documents[:, : self.context], self.keep)
        if self.refine:
            shares = budget_losses.refine(model, documents, shares, self.refine, n_rest=n_rest)
            print("KL to the full cache, before and after each round:", *shares.losses)
        budgets.save(shares, self.out)
        ranked = sorted((s for row in shares.shares for s in row if s), reverse=True)
        tenth = max(1, len(ranked) // 10)
        part = sum(ranked[:tenth]) / sum(ranked)
        print(f"{self.out}: {tenth} of {len(ranked)} heads need {part:.0%} of the slots")


@dataclass(frozen=True)
class A2ats:
    """Finds codebooks of the keys (A²ATS) and writes them to a folder, where an interrupted run goes on.

    Args:
        out: the folder.
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: pydoc_data.topics (prose that every Python has), or text files.
        tokens: of the texts, in documents.
        uuid_tokens: of random UUIDs, in documents.
        context: tokens of a document.
        centroids: per KV head; each takes 20 tokens' keys at most, and needs 10.
        refine: steps that move the centroids towards true attention after k-means.
        seed: chooses the documents and the first centroids.
    """

    out: Path
    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    tokens: int = 65536
    uuid_tokens: int = 16384
    context: int = 2048
    centroids: int = 4096
    refine: int = 0
    seed: int = 0

    def run(self) -> None:
        """Writes the folder, and which layers are attended densely."""
        if self.context < 1 or self.tokens % self.context or self.uuid_tokens % self.context:
            raise ValueError(
                f"texts are whole documents, got {self.tokens=} and {self.uuid_tokens=} of {self.context=}: "
                "take multiples of it"
            )
        model = kvjax.load(self.model, self.dtype)
        check_tokenizer(model)
        n, n_uuid, length = self.tokens // self.context, self.uuid_tokens // self.context, self.context
        documents = np.concatenate(
            [
                text.documents(model.tokenizer, self.texts, n, length, self.seed),
                text.uuids(model.tokenizer, n_uuid, length, self.seed),
            ]
        )
        settings = a2ats.Settings(self.centroids, refine=self.refine, seed=self.seed)
        flat = a2ats.calibrate(model, documents, self.out, settings).flat
        dense = ", ".join(str(i) for i, is_flat in enumerate(flat) if is_flat)
        print(f"{self.out}: {self.centroids} centroids a head; layers attended densely: {dense or 'none'}")


@dataclass(frozen=True)
class Chess:
    """Finds thresholds of activations (CHESS) and writes them to a folder, where an interrupted run goes on.

    Args:
        out: the folder.
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        sparsity: the share of activations that are left out, in [0, 1).
        method: chess, chess:plus=True, chess:statistic=rms, cats or teal; group=8 for blocks of channels.
        texts: pydoc_data.topics (prose that every Python has), or text files.
        tokens: of the texts, in documents.
        context: tokens of a document.
        refine: steps on the model's loss, in which layers and channels come to share the sparsity.
        seed: chooses the documents, and their order in refinement.
    """

    out: Path
    model: str = "smollm2-135m"
    dtype: str | None = None
    sparsity: float = 0.5
    method: str = "chess"
    texts: tuple[str, ...] = (text.PROSE,)
    tokens: int = 65536
    context: int = 2048
    refine: int = 0
    seed: int = 0

    def run(self) -> None:
        """Writes the folder."""
        if self.context < 1 or self.tokens % self.context:
            raise ValueError(
                f"texts are whole documents, got {self.tokens=} of {self.context=}: take a multiple of it"
            )
        method = spec.parse(self.method, SPARSITIES, sparsity=self.sparsity)
        model = kvjax.load(self.model, self.dtype)
        check_tokenizer(model)
        n = self.tokens // self.context
        documents = text.documents(model.tokenizer, self.texts, n, self.context, self.seed)
        chess.calibrate(model, documents, self.out, method, refine=self.refine, seed=self.seed)
        print(f"{self.out}: {method}")


@dataclass(frozen=True)
class Calibrate:
    """Finds what a method needs to know of a model, from text, and stores it."""

    what: Budgets | A2ats | Chess

    def run(self) -> None:
        """Writes what was found."""
        self.what.run()


def check_tokenizer(model: Model) -> None:
    """Raises ValueError for a model without a tokenizer."""
    if model.tokenizer is None:
        raise ValueError(f"text needs a tokenizer, got none with {model.name!r}: add tokenizer.json")
