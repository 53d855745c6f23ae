"""Tokens come in calls that grow, and are those of one call."""

import sys

import numpy as np
from method_cases import tiny

import kvjax


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
