"""Tokens come in calls that grow, and are those of one call."""

import functools
import sys

import numpy as np
import pytest
from method_cases import tiny

import kvjax
from kvjax import cache, reading, replay, spec

FULL = kvjax.METHODS["full"]()


def test_calls_grow_and_give_what_one_call_gives(monkeypatch):
    model, prompts, taken = tiny(2), [[3, 5, 7], [11, 13, 17]], []

    def decode(*args, steps, **options):
        taken.append(steps)
        return kvjax.decode(*args, steps=steps, **options)

    monkeypatch.setattr(sys.modules["kvjax.generate"], "decode", decode)
    sampling = kvjax.Sampling(stop=())
    tokens = list(kvjax.stream(model, prompts, max_new_tokens=150, sampling=sampling))
    assert taken == [8, 16, 32, 64, 30]
    logits, state = kvjax.prefill(model, np.array(prompts), room=150)
    forced, full = np.full((2, 150), -1, np.int32), kvjax.METHODS["full"]()
    wanted = kvjax.decode(model, logits, state, full, forced, sampling=sampling)[0]
    np.testing.assert_array_equal(np.array(tokens).T, wanted)


def test_a_row_draws_anew_after_the_longest_has_ended():
    model, sampling = tiny(2), kvjax.Sampling(temperature=1e6, stop=())
    ids, forced = kvjax.pad([list(range(1, 41)), [3, 5, 7]]), np.full((2, 24), -1, np.int32)
    forced[0] = -2
    logits, state = kvjax.prefill(model, ids, room=24)
    options = {"sampling": sampling, "keep_logits": True}
    drawn, _, _, kept = kvjax.decode(model, logits, state, FULL, forced, **options)
    drawn, kept = np.asarray(drawn), np.asarray(kept)
    assert (drawn[0] == -1).all()
    ranks = (kept[1] > np.take_along_axis(kept[1], drawn[1][:, None], axis=1)).sum(1)
    assert len(set(ranks.tolist())) > 12  # of 97 that are as likely, 24 draws have 21 in the mean


@pytest.mark.parametrize("name", ["full", "snapkv:window=4", "tova", "streaming_llm", "h2o", "knorm"])
@pytest.mark.parametrize("windows", [(None, None), (64, 64)])
def test_a_state_that_cannot_hold_what_its_budget_keeps_is_refused(name, windows):
    method = spec.parse(name, **({} if name == "full" else {"budget": 64}))
    model, (first, more) = tiny(2, windows=windows), np.arange(1, 21).reshape(2, 1, 10)
    _, state = kvjax.prefill(model, first, method, room=2)
    with pytest.raises(ValueError, match=r"room for the prompt, got 10 \+ 70 tokens in \d+ slots"):
        kvjax.prefill(model, more, method, room=60, state=state)
    _, state = kvjax.prefill(model, first, method, room=70)
    logits, state = kvjax.prefill(model, more, method, room=60, state=state)
    forced = np.full((1, 50), 7, np.int32)
    state = kvjax.decode(model, logits, state, method, forced)[2]
    held = 64 if name != "full" or windows[0] else 70
    assert all(held - method.n_free <= int(n) <= held for kv in state for n in np.ravel(cache.count(kv)))


def test_any_window_serves_a_short_prompt():
    model, ids = tiny(2), np.arange(1, 17)[None]
    for window in (20, 24, 32, 48):
        whole = kvjax.prefill(model, ids, spec.parse("snapkv", budget=64, window=window), room=4)[0]
        np.testing.assert_array_equal(whole, kvjax.prefill(model, ids, room=4)[0])


def test_what_cannot_be_read_is_refused():
    model, ids = tiny(2), np.array([[3, 5, 7]])
    refused = functools.partial(pytest.raises, ValueError)
    with refused(match="2 or more tokens at once, got chunk=1"):
        kvjax.prefill(model, ids, chunk=1)
    others = ([1, 2, 3], "rows of token ids"), ([[5.7]], "rows of token ids"), ([[5, -1]], "got -1")
    for prompts, match in others:
        with refused(match=match):
            sys.modules["kvjax.generate"]._encode(model, prompts, begins=True)
    with refused(match="text needs a tokenizer"):
        kvjax.generate(model, "Hi")
    logits, state = kvjax.prefill(model, ids, room=3)
    with refused(match="ids are below 97, got 97"):
        kvjax.decode(model, logits, state, FULL, np.full((1, 2), 97))
    with refused(match="ids are below 97, got 300"):
        kvjax.decode_step(model, np.array([300]), state)
    with refused(match="documents fit the context"):
        replay.record(model, [[1] * (model.config.context_length + 1)], room=0)
    with refused(match=r"room for the prompt, got 3 \+ 50"):
        reading.read(model, np.ones((1, 50), int), FULL, state)
    with refused(match="at least one method"):
        kvjax.chain()


def test_no_more_steps_are_taken_than_tokens_are_asked_for():
    model = tiny(2)
    logits, state = kvjax.prefill(model, np.array([[3, 5, 7]]), room=8)
    tokens, _, state, _ = kvjax.decode(model, logits, state, FULL, np.full((1, 2), 9), steps=5)
    assert tokens.tolist() == [[9, 9]]
    assert state[0].seen.tolist() == [5]
