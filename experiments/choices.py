"""Scores multiple choice by likelihood, from files that hold its questions, as lm-evaluation-harness does.

    acc        the choice of largest log p(choice | context)
    acc_norm   the same, divided by the bytes of the choice

Files have a JSON object a line, in one of the forms that `read` knows: those of HellaSwag, PIQA, ARC and
OpenBookQA as their authors publish them, or {"context": ..., "choices": [...], "answer": 0}. Nothing is
fetched.

Source: lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness), its tasks of these names: prompts
and the two scores.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import measure

__all__ = ["Question", "accuracy", "read"]


@dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of these does."""

    context: str
    choices: tuple[str, ...]
    answer: int


def read(path: Path | str, n: int | None = None) -> list[Question]:
    """Reads the first n questions of a file, all by default.

    Raises:
        ValueError: for a line of an unknown form, or an answer that is none of the choices.
    """
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    return [_question(json.loads(line), f"{path}:{i + 1}") for i, line in enumerate(lines[:n])]


def accuracy(model: kvjax.Model, questions: Iterable[Question]) -> dict[str, float]:
    """Returns the shares of questions answered rightly, by both scores, and how many there are.

    Raises:
        ValueError: for no question, or one that does not fit the model's context.
    """
    right, right_norm, n = 0, 0, 0
    for question in questions:
        scores = _log_likelihoods(model, question)
        n_bytes = np.array([len(choice.encode()) for choice in question.choices])
        right += int(np.argmax(scores)) == question.answer
        right_norm += int(np.argmax(scores / n_bytes)) == question.answer
        n += 1
    if not n:
        raise ValueError("accuracy is of at least one question, got none")
    return {"acc": right / n, "acc_norm": right_norm / n, "questions": n}


def _log_likelihoods(model: kvjax.Model, question: Question) -> np.ndarray:
    """Returns log p of each choice after the context."""
    whole = [model.tokenizer.encode(question.context + choice) for choice in question.choices]
    n_context = len(model.tokenizer.encode(question.context.rstrip()))
    length = -(-max(map(len, whole)) // 32) * 32  # few lengths, few programs
    ids = np.zeros((len(whole), length), np.int32)  # padded on the right, which no token before sees
    for row, tokens in zip(ids, whole, strict=True):
        row[: len(tokens)] = tokens
    nll = np.asarray(measure.nll(model.logits(ids)[:, :-1], jnp.asarray(ids[:, 1:])))
    return np.array([-row[n_context - 1 : len(t) - 1].sum() for row, t in zip(nll, whole, strict=True)])


def _question(line: Mapping[str, Any], where: str) -> Question:
    """Returns a question from a line of any known form."""
    if {"context", "choices", "answer"} <= line.keys():
        made = line["context"], line["choices"], line["answer"]
    elif {"ctx_a", "ctx_b", "endings", "label"} <= line.keys():  # HellaSwag
        context = f"{line['activity_label']}: {line['ctx_a']} {line['ctx_b'].capitalize()}"
        endings = [" " + _plain(ending) for ending in line["endings"]]
        made = _plain(context), endings, int(line["label"])
    elif {"goal", "sol1", "sol2", "label"} <= line.keys():  # PIQA
        solutions = [" " + line[name] for name in ("sol1", "sol2")]
        made = f"Question: {line['goal']}\nAnswer:", solutions, int(line["label"])
    elif isinstance(line.get("question"), Mapping) and "answerKey" in line:  # ARC and OpenBookQA
        choices = line["question"]["choices"]
        labels = [choice["label"] for choice in choices]
        made = _stem(line), [" " + choice["text"] for choice in choices], _index(labels, line["answerKey"])
    else:
        raise ValueError(f"a question has a known form, got {sorted(line)} in {where}")
    context, choices, answer = made
    if not 0 <= answer < len(choices):
        raise ValueError(f"an answer is one of the choices, got {answer} of {len(choices)} in {where}")
    return Question(context, tuple(choices), answer)


def _stem(line: Mapping[str, Any]) -> str:
    """Returns the context of a question: ARC asks for an answer, OpenBookQA (with a fact) goes on."""
    stem = line["question"]["stem"]
    return stem if "fact1" in line else f"Question: {stem}\nAnswer:"


def _index(labels: Sequence[str], label: str) -> int:
    return labels.index(label) if label in labels else -1


def _plain(text: str) -> str:
    """Returns HellaSwag's text without the marks of WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
