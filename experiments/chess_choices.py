"""What activation sparsity costs in multiple choice, zero-shot, on files of questions."""

import functools
from dataclasses import dataclass
from pathlib import Path

import kvjax
from experiments import choices, results
from experiments.rows import measured, start
from kvjax import spec, text
from kvjax.calibrate import chess
from kvjax.sparsity import SPARSITIES

__all__ = ["Choices", "score"]


@dataclass(frozen=True)
class Choices:
    """What to ask.

    Args:
        files: questions, see `experiments.choices`.
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        learned: text files, or pydoc_data.topics, that thresholds are made from.
        questions: of each file, at most.
        tokens: that thresholds are made from.
        length: tokens of a document that they are made from.
        methods: such as chess:plus=True.
        sparsities: shares of the activations that are left out.
        seed: chooses the documents.
        out: the folder of results.
    """

    files: tuple[Path, ...]
    model: str = "smollm2-135m"
    dtype: str | None = None
    learned: tuple[str, ...] = (text.PROSE,)
    questions: int = 1000
    tokens: int = 65536
    length: int = 2048
    methods: tuple[str, ...] = (*SPARSITIES, "chess:plus=True")
    sparsities: tuple[float, ...] = (0.5,)
    seed: int = 0
    out: Path = results.FOLDER


def score(settings: Choices) -> int:
    """Asks each method what is not stored yet, and prints the rows.

    Raises:
        ValueError: for a file that holds no questions.
        OSError: for one that cannot be read.
    """
    asked = {path.stem: choices.read(path, settings.questions) for path in settings.files}
    s, model = settings, kvjax.load(settings.model, settings.dtype)
    methods = {
        (name, share): spec.parse(name, SPARSITIES, sparsity=share)
        for share in s.sparsities
        for name in s.methods
    }

    @functools.cache
    def models() -> dict:
        documents = text.documents(model.tokenizer, s.learned, s.tokens // s.length, s.length, s.seed)
        found = chess.closed_form(chess.Passes(model, documents), list(methods.values()))
        sparse = {key: t.apply(model) for key, t in zip(methods, found, strict=True)}
        return {("dense", 0.0): model, **sparse}

    stored = start("chess", "choices", settings)
    for name, share in (("dense", 0.0), *methods):
        for file, questions in asked.items():
            row = {"name": name, "sparsity_asked": share, "file": file}
            ask = functools.partial(choices.accuracy, questions=questions)
            stored = measured(stored, row, lambda a=ask, key=(name, share): a(models()[key]))
            claim = f"{s.model.split('-')[0]}.{name}.{file}.acc_norm@{share:g}"
            stored = stored.claim({claim: stored.find(row)["acc_norm"]})
    print(stored.path)
    return 0
