"""Savings are real: in the bytes of the state, and in the memory of the compiled decode step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import codebooks

import kvjax
from kvjax import decoding, measure, states
from kvjax.method import CacheMethod
from kvjax.methods import METHODS, make
from kvjax.model import Model
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.program import Program

N_LAYERS, CONTEXT, NEW, BATCH = 3, 2048, 256, 4
TOTAL = CONTEXT + NEW
QUARTER = TOTAL // 4


def smollm2_shaped() -> Model:
    """SmolLM2's layers, three of them, as shapes alone."""
    config = ModelConfig(
        family="llama",
        vocab_size=49152,
        width=576,
        ffn_width=1536,
        n_layers=N_LAYERS,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        context_length=8192,
        rope=RopeConfig(base=1e5),
        norm_eps=1e-5,
        query_scale=0.125,
        layer_windows=(None,) * N_LAYERS,
    )
    params: dict = {}
    for path, shape in config.param_shapes().items():
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Model("smollm2-shaped", config, params, None, jnp.dtype("float32"))


MODEL = smollm2_shaped()
BOOKS = codebooks(MODEL)
TABLE = np.where(np.arange(N_LAYERS * 3).reshape(N_LAYERS, 3) % 3 == 0, 2 * QUARTER, QUARTER // 2)
CASES = {
    name: make(
        name,
        **({"budget": QUARTER} if "budget" in METHODS[name].__dataclass_fields__ else {}),
        **({"chunk": 64, "slack": 64} if name == "chelsea" else {}),  # a head of the table below has 288
        **({"topk": QUARTER, "calibration": BOOKS, "far": BOOKS.far} if name == "a2ats" else {}),
    )
    for name in METHODS
}
CASES |= {
    f"{name} ragged": dataclasses.replace(m, budget=TABLE)
    for name, m in CASES.items()
    if m.evicts and not isinstance(m, kvjax.method.Chain)
}
CASES["snapkv+kivi4"] = kvjax.chain(CASES["snapkv"], make("kivi", bits=4))


def decoding_state(method: CacheMethod):
    """The state after a prompt of CONTEXT tokens, as shapes."""
    program = Program.of(MODEL, method)

    def prompt_read():
        state = states.init_state(MODEL, method, BATCH, TOTAL, CONTEXT)
        q, pos = jnp.zeros((BATCH, 64, 3, 3, 64)), jnp.zeros((BATCH, 64), jnp.int32)
        return tuple(m.compress(kv, q, pos) for m, kv in zip(program.methods, state, strict=True))

    return program, jax.eval_shape(prompt_read)


def index_bytes(state) -> int:
    """Bytes of the methods' own indices."""
    return sum(measure.nbytes(kv.aux) for kv in state)


@pytest.mark.parametrize("name", [name for name, m in CASES.items() if m.evicts])
def test_a_quarter_of_the_budget_is_a_quarter_of_the_bytes(name):
    full = measure.nbytes(decoding_state(CASES["full"])[1])
    _, state = decoding_state(CASES[name])
    assert measure.nbytes(state) - index_bytes(state) <= 0.26 * full
    assert index_bytes(state) <= 0.01 * full
    assert full == BATCH * N_LAYERS * (TOTAL * 3 * (2 * 64 * 4 + 8) + 16)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.36), (4, 0.24)])
def test_quantised_storage_holds_what_it_says(bits, share):
    """float32: 8 bits are a quarter, 4 bits an eighth; scales, zeros and the recent ring come on top."""
    full = measure.nbytes(decoding_state(CASES["full"])[1])
    assert measure.nbytes(decoding_state(make("kivi", bits=bits))[1]) <= share * full


@pytest.mark.parametrize("name", CASES)
def test_the_compiled_step_makes_no_copy_of_the_cache(name):
    program, state = decoding_state(CASES[name])
    ids = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)
    step = decoding._step.lower(MODEL.variables, ids, ids, state, program=program).compile()
    memory = step.memory_analysis()
    cache, params = measure.nbytes(state), 4 * MODEL.config.n_params()
    assert memory.alias_size_in_bytes >= cache
    assert memory.argument_size_in_bytes <= (cache + params) * 1.001 + 4096
    assert memory.output_size_in_bytes <= cache + BATCH * 49152 * 4 + 4096
    # One layer's slots in full precision may exist for a moment, the cache as a whole never twice.
    layer = BATCH * max(sum(kv.slots) for kv in state) * 2 * 64 * 4
    assert memory.temp_size_in_bytes <= 1.3 * layer + 8 * 2**20
