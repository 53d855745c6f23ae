"""Laws of replaying a prompt, over the registry: it leaves what prefill leaves, and budgets can share it."""

import jax
import numpy as np
import pytest
from method_cases import codebooks

import kvjax
from kvjax import replay, spec
from kvjax.models.decoder import Record
from tests.tiny_models import tiny

MODELS = {"full attention": tiny(windows=(None,)), "a window": tiny(windows=(24, None))}
ROOM, QUESTION = 12, 7
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, 96).tolist(), RNG.integers(0, 256, 61).tolist()]
BOOKS = {name: codebooks(model) for name, model in MODELS.items()}
NAMES = [*kvjax.METHODS, "kivi4", "snapkv+kivi4", "knorm+quest"]
every_method = pytest.mark.parametrize("name", NAMES)
every_model = pytest.mark.parametrize("model_name", MODELS)


def method_of(name: str, budget: int, model_name: str) -> kvjax.CacheMethod:
    short = {"budget": budget, "window": 32 if "kivi" in name else 8, "n_recent": 8, "chunk": 16}
    books = BOOKS[model_name]
    return spec.parse(name, topk=budget, calibration=books, far=books.far, **short)


def recorded(model_name: str):
    return replay.record(MODELS[model_name], PROMPTS, room=ROOM, chunk=32)


def part(records, columns: slice):
    return [Record(*(x[:, columns] for x in record)) for record in records]


def assert_equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), ours, theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@every_method
@every_model
def test_replay_leaves_what_prefill_leaves(name, model_name):
    model, method = MODELS[model_name], method_of(name, 40, model_name)
    _, pos, records = recorded(model_name)
    _, state = kvjax.prefill(model, kvjax.pad(PROMPTS), method, room=ROOM, chunk=32)
    assert_equal(replay.replay(model, method, records, pos, room=ROOM, chunk=32), state)


@every_method
@every_model
def test_what_is_observed_of_a_prompt_does_not_depend_on_the_budget(name, model_name):
    _, pos, records = recorded(model_name)
    one, other = (
        replay.read(
            MODELS[model_name], method_of(name, budget, model_name), records, pos, room=ROOM, chunk=32
        )
        for budget in (40, 64)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


@every_method
@every_model
def test_a_prompt_in_two_parts_is_the_prompt(name, model_name):
    model, method = MODELS[model_name], method_of(name, 40, model_name)
    _, pos, records = recorded(model_name)
    whole = replay.read(model, method, records, pos, room=ROOM, chunk=32)
    head, tail = slice(None, -QUESTION), slice(-QUESTION, None)
    first = replay.read(
        model, method, part(records, head), pos[:, head], room=ROOM + QUESTION, later=QUESTION, chunk=32
    )
    both = replay.read(model, method, part(records, tail), pos[:, tail], room=ROOM, state=first)
    assert_equal(both, whole)


@pytest.mark.parametrize("name", ["full", "snapkv", "quest"])
def test_a_finished_state_may_be_consumed(name):
    model, method = MODELS["full attention"], method_of(name, 40, "full attention")
    logits, pos, records = recorded("full attention")
    prompt = replay.read(model, method, records, pos, room=ROOM, chunk=32)
    forced = np.full((2, 4), 5, np.int32)
    tokens = [
        kvjax.decode(model, logits, replay.finish(model, method, prompt, records, pos), method, forced)[3:]
        for _ in range(2)
    ]
    assert len(tokens) == 2  # the second would find its buffers donated to the first
