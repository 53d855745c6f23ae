"""Questions are read in the forms that their authors publish, and scored by likelihood."""

import json

import jax
import numpy as np
import pytest

from experiments import choices
from tests.tiny_models import byte_tokenizer, tiny

MODEL = tiny(byte_tokenizer())


def labelled(*texts):
    return [{"text": text, "label": label} for text, label in zip(texts, "AB", strict=True)]


LINES = [
    {"context": "One plus one is", "choices": [" two.", " nine."], "answer": 0},
    {
        "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "label": 1,
        "endings": ["starts [header] up [title] and", "sings."],
    },
    {"goal": "To boil water,", "sol1": "heat it.", "sol2": "freeze it.", "label": 0},
    {"question": {"stem": "Which is a star?", "choices": labelled("Sun", "Moon")}, "answerKey": "A"},
    {"question": {"stem": "Ice is", "choices": labelled("cold", "hot")}, "answerKey": "A", "fact1": "so"},
]  # fmt: skip


def write(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def test_forms_become_contexts_and_choices(tmp_path):
    ours = choices.read(write(tmp_path / "all.jsonl", LINES))
    assert [q.answer for q in ours] == [0, 1, 0, 0, 0]
    assert ours[1].context == "Roof: A man sits. He"
    assert ours[1].choices == (" starts up. and", " sings.")
    assert ours[2].context == "Question: To boil water,\nAnswer:"
    assert ours[3] == choices.Question("Question: Which is a star?\nAnswer:", (" Sun", " Moon"), 0)
    assert ours[4].context == "Ice is"
    assert len(choices.read(tmp_path / "all.jsonl", 2)) == 2


def test_what_is_no_question_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a question has a known form"):
        choices.read(write(tmp_path / "a.jsonl", [{"text": "?"}]))
    with pytest.raises(ValueError, match="one of the choices"):
        choices.read(write(tmp_path / "b.jsonl", [{"context": "", "choices": ["a"], "answer": 1}]))
    with pytest.raises(ValueError, match="at least one question"):
        choices.accuracy(MODEL, [])


def test_scores_are_log_likelihoods_of_the_choices():
    question = choices.Question("ab", (" cd", " e"), 0)
    ours = choices._log_likelihoods(MODEL, question)
    for choice, score in zip(question.choices, ours, strict=True):
        ids = MODEL.tokenizer.encode(question.context + choice)
        logp = jax.nn.log_softmax(MODEL.logits(ids)[0])
        expected = sum(float(logp[i - 1, ids[i]]) for i in range(2, len(ids)))
        np.testing.assert_allclose(score, expected, rtol=1e-4)
    found = choices.accuracy(MODEL, [question])
    assert found["acc"] == float(ours[0] > ours[1])
    assert found["acc_norm"] == float(ours[0] / 3 > ours[1] / 2)
    assert found["questions"] == 1


def test_a_real_model_knows_an_easy_answer(smollm2):
    question = choices.Question("The capital of France is", (" Berlin.", " Paris.", " banana."), 1)
    assert choices.accuracy(smollm2, [question])["acc"] == 1
