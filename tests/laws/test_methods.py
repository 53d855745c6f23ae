"""Laws that every method of the registry obeys; a new method is tested by being there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import pytest
from method_cases import BUDGET, EVICTS, FORCED, NEW, ONE_LAYER, PROMPT, PROMPTS, fitted, run, settings

import kvjax
from kvjax import cache, decoding, measure, storage
from kvjax.method import CacheMethod
from kvjax.methods import METHODS, make, per_layer

# The second has two layers, which are unlike.
MODELS = {"G2": ONE_LAYER, "G1 with a window": method_cases.MODELS["G1 with a window"]}
CASES = {name: fitted(method, ONE_LAYER) for name, method in method_cases.CASES.items()}
every_method = pytest.mark.parametrize("name", CASES)
every_model = pytest.mark.parametrize("model_name", MODELS)
# Chains and settings are tried on one model: what their parts do on the others is known.
everywhere = pytest.mark.parametrize(
    ("name", "model_name"), [(n, m) for n in CASES for m in MODELS if n in METHODS or m == "G2"]
)


@functools.cache
def of(name: str, model_name: str) -> CacheMethod:
    """The method of a case, for a model."""
    return CASES[name] if model_name == "G2" else fitted(CASES[name], MODELS[model_name])


@functools.cache
def usual(model_name: str, name: str):
    """The run that several laws look at."""
    return run(MODELS[model_name], of(name, model_name))


@everywhere
def test_output_is_finite_and_differs_between_inputs(name, model_name):
    logits, _ = usual(model_name, name)
    assert np.isfinite(logits).all()
    assert np.abs(logits[0] - logits[1]).max() > 0.1


@every_method
def test_no_occupied_slot_lies_beyond_the_extent(name):
    model = MODELS["G2"]
    _, state = kvjax.prefill(model, PROMPTS, CASES[name], room=NEW)
    for step in range(NEW):
        for kv in state:
            mass, extent = np.asarray(kv.mass), np.asarray(cache.extent(kv))
            for head, start in enumerate(cache.starts(kv.slots)):
                for b in range(2):
                    assert not mass[b, start + extent[b, head] : start + kv.slots[head]].any()
        _, state = kvjax.decode_step(model, FORCED[:, step], state, CASES[name])


@every_method
def test_equal_settings_compile_once(name):
    run(MODELS["G2"], CASES[name])
    before = decoding._decode._cache_size()
    copy = dataclasses.replace(CASES[name])
    assert copy is not CASES[name]
    run(MODELS["G2"], copy)
    assert decoding._decode._cache_size() == before


@everywhere
def test_a_step_keeps_structure_shapes_and_types(name, model_name):
    model = MODELS[model_name]
    _, state = usual(model_name, name)
    shapes = jax.eval_shape(lambda s: s, state)

    def step(s, _):
        return kvjax.decode_step(model, jnp.zeros(2, jnp.int32), s, of(name, model_name))[1], None

    assert jax.eval_shape(lambda s: jax.lax.scan(step, s, None, length=3)[0], state) == shapes


@pytest.mark.parametrize("name", [n for n in METHODS if "budget" in settings(n)] + ["full"])
@every_model
def test_full_budget_is_dense(name, model_name):
    model = MODELS[model_name]
    total = 128 + NEW  # the prompt is padded to a power of two
    method = make(name, **settings(name, total))
    dense, _ = usual(model_name, "full")
    ours, _ = run(model, method)
    np.testing.assert_allclose(ours, dense, atol=2e-4)


@pytest.mark.parametrize("name", [n for n in EVICTS if n in METHODS])
@pytest.mark.parametrize("compress", ["end", "chunk"])
def test_slots_stay_within_the_budget(name, compress):
    model = MODELS["G2"]
    forced = np.full((2, 70), 5, np.int32)  # long enough to turn every slot over
    _, state = run(model, CASES[name], forced=forced, compress=compress, chunk=32)
    for kv in state:
        assert kv.slots == (BUDGET,) * 2
        assert int(cache.count(kv).max()) <= BUDGET
        assert int(cache.count(kv).min()) >= BUDGET - CASES[name].n_free  # and the budget is used


@every_method
def test_a_method_that_is_not_due_has_no_work(name):
    """A step does what is due before it returns; then `compress` changes nothing, but rounds codes anew."""
    model, method = MODELS["G2"], CASES[name]
    _, state = kvjax.prefill(model, PROMPTS, method, room=NEW)
    if method.due(state[0]) is None:
        pytest.skip("compresses in every step")
    flags = []
    for token in FORCED.T:
        _, state = kvjax.decode_step(model, token, state, method)
        q, pos = jnp.zeros((2, 1, 2, 2, 16)), state[0].seen[:, None] - 1
        for kv in state:
            assert not method.due(kv).any()
            twice = method.compress(kv, q, pos)
            same = (kv.pos, kv.mass, kv.fill, kv.seen), (twice.pos, twice.mass, twice.fill, twice.seen)
            dense = not isinstance(kv.k, storage.Quantized)
            jax.tree.map(np.testing.assert_array_equal, *((kv, twice) if dense else same))
        flags.append(int(state[0].fill.max()))
    assert (np.diff(flags) < 0).any()


@everywhere
def test_mass_accounts_for_the_tokens_seen(name, model_name):
    model, method = MODELS[model_name], of(name, model_name)
    _, state = usual(model_name, name)
    for kv, m in zip(state, per_layer(method, model.config), strict=True):
        for part in cache.runs(kv.slots):
            mass = np.asarray(cache.view(kv.mass, part)).sum(-1)
            assert (mass <= PROMPT + NEW).all()
            if not m.evicts:
                assert (mass == PROMPT + NEW).all()
        assert (np.asarray(kv.seen) == PROMPT + NEW).all()


@everywhere
def test_empty_slots_may_hold_nan(name, model_name):
    model, method = MODELS[model_name], of(name, model_name)
    ids = np.where(np.arange(PROMPT) < PROMPT - 40, -1, PROMPTS)  # as long as the other laws' prompts
    first, state = kvjax.prefill(model, ids, method, room=NEW)

    def poison(kv):
        rows = jax.tree.leaves(kv.rows)
        if not all(x.dtype == rows[0].dtype for x in rows) or isinstance(kv.k, storage.Quantized):
            return kv  # codes hold no NaN
        empty, new = (kv.mass == 0)[..., None], []
        for x in rows:
            where = jnp.repeat(empty, x.shape[1] // empty.shape[1], axis=1)
            new.append(jax.device_put(jnp.where(where, jnp.nan, np.asarray(x)), x.sharding))
        if kv.tier is None:
            return kv.replace(k=new[0], v=new[1])
        return kv.replace(tier=kv.tier.replace(far=new[0]))

    assert any((kv.mass == 0).any() for kv in state)
    poisoned = tuple(poison(kv) for kv in jax.tree.map(jnp.copy, state))
    clean = kvjax.decode(model, first, state, method, FORCED, keep_logits=True)[3]
    dirty = kvjax.decode(model, first, poisoned, method, FORCED, keep_logits=True)[3]
    np.testing.assert_array_equal(np.asarray(clean), np.asarray(dirty))


@everywhere
def test_chunked_prefill_equals_one_shot(name, model_name):
    model = MODELS[model_name]
    at_once, _ = usual(model_name, name)
    chunked, state = run(model, of(name, model_name), chunk=32)
    if any(isinstance(kv.k, storage.Quantized) for kv in state):
        dense, _ = usual(model_name, "full")  # rounding flips a code here and there: seen, 0.5% of them
        assert np.abs(chunked - at_once).mean() < 0.03 * np.abs(at_once - dense).mean()
    else:
        np.testing.assert_allclose(chunked, at_once, atol=2e-4)


@everywhere
def test_no_row_sees_another(name, model_name):
    """In twos, since the programs for that many rows are those of the other laws."""
    model, none = MODELS[model_name], []
    rows = {n: PROMPTS[0, :n].tolist() for n in (PROMPT, 1, 37)}

    def logits(*pair):
        ids = kvjax.pad([*pair, rows[PROMPT]])[:2]
        out, state = run(model, of(name, model_name), ids=ids, forced=FORCED[[0, 0]])
        assert np.asarray(state[-1].seen).tolist() == [len(row) + NEW for row in pair]
        assert np.isfinite(out).all()
        return out

    alone = {n: logits(row, none)[0] for n, row in rows.items()}
    for pair in ((PROMPT, 37), (1, PROMPT)):
        for ours, n in zip(logits(*(rows[n] for n in pair)), pair, strict=True):
            np.testing.assert_allclose(ours, alone[n], atol=2e-4)


@every_method
def test_padding_changes_nothing(name):
    model, method = MODELS["G2"], CASES[name]
    _, state = kvjax.prefill(model, PROMPTS, method, room=NEW)
    before = jax.tree.map(np.array, state)
    _, state = kvjax.decode_step(model, np.array([7, -1], np.int32), state, method)
    for old, new in zip(before, state, strict=True):
        np.testing.assert_array_equal(old.seen + np.array([1, 0]), new.seen)
        for run_ in cache.runs(new.slots):
            np.testing.assert_array_equal(cache.view(old.pos, run_)[1], cache.view(new.pos, run_)[1])
            np.testing.assert_array_equal(cache.view(old.mass, run_)[1], cache.view(new.mass, run_)[1])


@pytest.mark.parametrize("name", METHODS)  # without jit each operation is compiled, so chains and tiers wait
def test_jit_changes_nothing(name):
    model, method = MODELS["G2"], CASES[name]
    _, state = kvjax.prefill(model, PROMPTS, method, room=NEW)
    copy = jax.tree.map(jnp.copy, state)
    jitted, _ = kvjax.decode_step(model, FORCED[:, 0], state, method)
    with jax.disable_jit():
        plain, _ = kvjax.decode_step(model, FORCED[:, 0], copy, method)
    np.testing.assert_allclose(np.asarray(jitted), np.asarray(plain), atol=1e-4)


@every_method
def test_bytes_are_those_of_the_leaves(name):
    model, method = MODELS["G2"], CASES[name]
    _, state = kvjax.prefill(model, PROMPTS, method, room=NEW)
    assert measure.nbytes(state) == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    read = measure.bytes_read(state, per_layer(method, model.config))
    assert 0 < read <= measure.nbytes(state)


@pytest.mark.parametrize("name", [n for n in METHODS if "budget" in settings(n)])
def test_a_table_of_equal_budgets_equals_an_int(name):
    model = MODELS["G2"]
    table = np.full((1, 2), BUDGET)
    as_int, _ = usual("G2", name)
    as_table, _ = run(model, make(name, **settings(name, table)))
    np.testing.assert_allclose(as_table, as_int, atol=1e-5)


@pytest.mark.parametrize("name", EVICTS)
def test_memory_of_a_ragged_table_is_its_sum(name):
    model = method_cases.MODELS["G2"]  # of two layers, each with a row of its own
    table = np.array([[40, 80], [36, 100]])
    method = CASES[name]
    if isinstance(method, kvjax.method.Chain):
        first = dataclasses.replace(method.methods[0], budget=table)
        method = kvjax.chain(first, *method.methods[1:])
    else:
        method = dataclasses.replace(method, budget=table)
    logits, state = run(model, method)
    assert np.isfinite(logits).all()
    for kv, row in zip(state, table, strict=True):
        assert kv.slots == tuple(row)
        assert kv.pos.shape == (2, row.sum())
        rows = jax.tree.leaves(kv.k)[0].shape[1]
        assert rows == row.sum()


@pytest.mark.parametrize("name", [n for n in METHODS if "budget" in settings(n) and METHODS[n].evicts])
def test_a_ragged_head_is_that_head_at_its_budget(name):
    """Head k of a ragged layer holds the tokens it would hold if all heads had its budget."""
    if name == "tova":
        pytest.skip("tova's heads rank together when their budgets are equal, and alone when not")
    model = MODELS["G2"]
    row = (40, 80)
    _, ragged = kvjax.prefill(model, PROMPTS, make(name, **settings(name, np.array([row]))), room=NEW)
    for head, budget in enumerate(row):
        _, uniform = kvjax.prefill(model, PROMPTS, make(name, **settings(name, budget)), room=NEW)
        start = sum(row[:head])
        ours = np.asarray(ragged[0].k)[:, start : start + budget]
        theirs = np.asarray(uniform[0].k)[:, head * budget : (head + 1) * budget]
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["full", "quest", "kivi"])
def test_overflow_raises_under_debug(name):
    model, method = MODELS["G2"], CASES[name]
    _, state = kvjax.prefill(model, PROMPTS[:, :16], method, room=1)
    full = tuple(kv.replace(fill=jnp.full_like(kv.fill, kv.slots[0])) for kv in state)
    step = kvjax.debug(lambda s: kvjax.decode_step(model, FORCED[:, 0], s, method)[0])
    with pytest.raises(Exception, match="the KV cache overflows"):
        step(full)


@pytest.mark.parametrize("bad", [0, -3, np.zeros((3, 2), int), 1.5, np.zeros((0,), int)])
@pytest.mark.parametrize("name", [n for n in METHODS if "budget" in settings(n)])
def test_bad_budgets_raise(name, bad):
    with pytest.raises(ValueError, match="a budget is"):
        make(name, budget=bad)


@pytest.mark.parametrize("name", [n for n in METHODS if "budget" in settings(n)])
def test_budgets_above_the_context_raise(name):
    with pytest.raises(ValueError, match="a budget is at most the context of 512 tokens"):
        kvjax.prefill(MODELS["G2"], PROMPTS, make(name, **settings(name, 513)))


def test_tables_of_the_wrong_shape_raise():
    with pytest.raises(ValueError, match="one row per layer"):
        kvjax.prefill(MODELS["G2"], PROMPTS, make("knorm", budget=np.full((3, 2), 40)))
    with pytest.raises(ValueError, match="one entry per KV head"):
        kvjax.prefill(MODELS["G2"], PROMPTS, make("knorm", budget=np.full((1, 3), 40)))


def test_unknown_names_give_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'snapkv'"):
        make("snap_kv")
    with pytest.raises(ValueError, match="did you mean 'budget'"):
        make("snapkv", buget=3)


def test_chains_refuse_a_late_eviction():
    with pytest.raises(ValueError, match="only the first method of a chain may evict"):
        kvjax.chain(make("kivi"), make("snapkv", budget=64))


def test_chains_refuse_mixed_keys():
    with pytest.raises(ValueError, match="store keys alike"):
        kvjax.chain(make("streaming_llm", budget=64), make("quest", budget=64))
