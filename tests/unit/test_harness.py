"""What an evaluation asks of a model with a method, and what lm-evaluation-harness makes of the answers."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from method_cases import MODELS

import kvjax
from experiments import choices, harness
from experiments.asked import Asked
from kvjax.sampling import Sampling

MODEL = MODELS["G2"]
CONTEXT = np.random.default_rng(0).integers(0, 97, 60).tolist()
RESTS = [[5, 6, 7], [8], np.random.default_rng(1).integers(0, 97, 20).tolist()]


@pytest.mark.parametrize("method", [kvjax.METHODS["full"](), kvjax.METHODS["streaming_llm"](budget=30)])
def test_likelihoods_are_those_of_one_step_after_the_other(method):
    found = Asked(MODEL, method).likelihoods(CONTEXT, RESTS)
    for rest, (likelihood, greedy) in zip(RESTS, found, strict=True):
        logits, state = kvjax.prefill(MODEL, kvjax.pad([CONTEXT]), method, room=len(rest))
        wanted, best = 0.0, []
        for token in rest:
            wanted += float(jax.nn.log_softmax(logits[0])[token])
            best.append(int(logits[0].argmax()))
            logits, state = kvjax.decode_step(MODEL, np.array([token]), state, method)
        assert likelihood == pytest.approx(wanted, rel=1e-4)
        assert greedy == (best == rest)
    ((_, greedy),) = Asked(MODEL, method).likelihoods(CONTEXT, [best[:1]])
    assert greedy


def test_a_context_that_is_too_long_keeps_its_end():
    asked, long = Asked(MODEL, kvjax.METHODS["full"]()), CONTEXT * 10  # of 512 tokens
    assert asked.likelihoods(long, RESTS[:1]) == asked.likelihoods(long[-496:], RESTS[:1])
    with pytest.raises(ValueError, match="context and continuations are tokens, got 0 and"):
        asked.likelihoods([], RESTS)
    with pytest.raises(ValueError, match=r"are tokens, got 60 and \[3, 0\]"):
        asked.likelihoods(CONTEXT, [[1, 2, 3], []])
    with pytest.raises(ValueError, match="leaves room in the context of 512 tokens, got 500"):
        asked.likelihoods(CONTEXT, [[1] * 500])


def test_an_answer_ends_before_what_ends_it():
    model = kvjax.load("smollm2-135m")
    asked = Asked(model, kvjax.METHODS["full"]())
    prompt = model.tokenizer.encode("The capital of France is")
    assert asked.continued(prompt, ["\n", "."], 8, Sampling()) == " Paris"
    assert asked.continued(prompt, [], 2, Sampling()) == " Paris."


def test_what_is_missing_is_told(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert harness.main(["ask", "--tasks", "piqa"]) == 1
    assert "which is not here: pip install" in capsys.readouterr().err


TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_finds_what_our_loader_finds(tmp_path):
    lines = [
        ("The capital of France is", [" Paris", " London", " a dog"], 0),
        ("Two plus two equals", [" five", " four", " banana"], 1),
        ("The sun rises in the", [" west", " east", " refrigerator"], 1),
        ("Water freezes at zero degrees", [" Paris", " Celsius"], 0),  # wrong on purpose
    ]
    names, path = ("context", "choices", "answer"), tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines))
    (tmp_path / "capitals.yaml").write_text(TASK.format(path=path))
    command = ["ask", "--tasks", "capitals", "--include", str(tmp_path), "--out", str(tmp_path / "out")]
    assert harness.main([*command, "--methods", "full", "snapkv:budget=128"]) == 0
    (stored,) = (tmp_path / "out" / "harness_ask").glob("*.json")
    ours = choices.accuracy(kvjax.load("smollm2-135m"), choices.read(path))
    for row in json.loads(stored.read_text())["rows"]:
        assert {name: row[name] for name in ours} == pytest.approx(ours)
    assert 0 < ours["acc"] < 1
    assert harness.main(["ask", "--tasks", "mmlu", "--out", str(tmp_path)]) == 2  # a group
