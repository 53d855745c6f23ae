"""Compares what our methods keep of a prompt with what kvpress keeps (make_kvpress.py)."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import cache
from kvjax.methods.h2o import H2O
from kvjax.methods.knorm import Knorm
from kvjax.methods.snapkv import SnapKV
from kvjax.methods.streaming_llm import StreamingLLM
from kvjax.methods.tova import TOVA
from kvjax.models.config import RopeConfig

DATA = Path(__file__).parent / "data" / "kvpress"
MODELS = ("g1", "g2")
RATIOS = (0.5, 0.8)
LAYERS = range(3)
# kvpress stops evicting when the prompt ends and then grows. A budget here includes the slot of the
# next token, so a method that makes room one token at a time is given one more.
METHODS = {
    "streaming_llm": lambda n_kept: StreamingLLM(budget=n_kept, n_sinks=4),
    "knorm": lambda n_kept: Knorm(budget=n_kept + 1),
    "tova": lambda n_kept: TOVA(budget=n_kept + 1),
    "snapkv_w16_k5": lambda n_kept: SnapKV(budget=n_kept + 1, window=16, kernel=5),
    "snapkv_w32_k7": lambda n_kept: SnapKV(budget=n_kept + 1, window=32, kernel=7),
}


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    """The inputs of one model and what the presses made of them."""
    with (
        np.load(DATA / f"{request.param}.npz") as inputs,
        np.load(DATA / f"{request.param}_presses.npz") as out,
    ):
        return dict(inputs), dict(out)


def read_prompt(method, inputs: dict, index: int):
    """Lets a method observe the prompt of one layer; v's first channel is the position."""
    q, k, v = (inputs[f"layer_{index}/{name}"][None] for name in "qkv")
    n_tokens, n_kv_heads, head_dim = k.shape[1:]
    group = q.shape[2] // n_kv_heads
    rope = RopeConfig(base=float(inputs["rope_base"]))
    layer = cache.Layer(n_kv_heads, group, head_dim, rope, scale=head_dim**-0.5)
    pos = jnp.arange(n_tokens)[None]
    v[..., 0] = np.asarray(pos)[..., None]
    q = jnp.asarray(q.reshape(1, n_tokens, n_kv_heads, group, head_dim))
    kv = method.init(layer, 1, (n_tokens,) * n_kv_heads, jnp.float32)
    kv, idx = cache.append(kv, jnp.asarray(k), jnp.asarray(v), pos)
    return method.observe(kv, q, jnp.asarray(k), pos, idx), q, pos


def kept_by(kv) -> np.ndarray:
    """Returns the prompt positions that each head holds, sorted, [K n_kept]."""
    heads = [np.asarray(cache.view(x, run)[0]) for run in cache.runs(kv.slots) for x in (kv.v, kv.mass)]
    values, masses = np.concatenate(heads[::2]), np.concatenate(heads[1::2])
    return np.stack([np.sort(v[m > 0, 0]) for v, m in zip(values, masses, strict=True)]).astype(int)


@pytest.mark.parametrize("index", LAYERS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", METHODS)
def test_kept_positions_equal_kvpress(golden, name, ratio, index):
    inputs, presses = golden
    method = METHODS[name](int(inputs[f"n_kept@{ratio}"]))
    kv = method.compress(*read_prompt(method, inputs, index))
    np.testing.assert_array_equal(kept_by(kv), presses[f"{name}@{ratio}/kept"][index])


@pytest.mark.parametrize("ratio", RATIOS)
def test_streaming_llm_renumbers_as_kvpress_rerotates(golden, ratio):
    """kvpress numbers survivors from 0, we end at the prompt's last position: the same distances."""
    inputs, presses = golden
    n_kept = int(inputs[f"n_kept@{ratio}"])
    method = StreamingLLM(budget=n_kept, n_sinks=4)
    kv = method.compress(*read_prompt(method, inputs, 0))
    np.testing.assert_array_equal(kept_by(kv), presses[f"streaming_llm_rerotated@{ratio}/kept"][0])
    order = np.argsort(np.asarray(kv.v)[0, :n_kept, 0])
    distances = np.asarray(kv.pos)[0, :n_kept][order] - (len(inputs["ids"]) - n_kept)
    np.testing.assert_array_equal(distances, np.arange(n_kept))


@pytest.mark.parametrize("index", LAYERS)
def test_h2o_sums_the_attention_that_kvpress_averages(golden, index):
    inputs, presses = golden
    method = H2O(budget=100)
    kv, _, _ = read_prompt(method, inputs, index)
    averages = presses["observed_attention/scores"][index]
    n_queries = np.arange(averages.shape[-1], 0, -1)
    np.testing.assert_allclose(
        np.asarray(kv.aux).reshape(averages.shape), averages * n_queries, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("index", LAYERS)
def test_h2o_keeps_the_newest_and_the_largest_sums(golden, index):
    inputs, presses = golden
    method = H2O(budget=100, recent=0.5)
    kv = method.compress(*read_prompt(method, inputs, index))
    averages = presses["observed_attention/scores"][index]
    n_tokens = averages.shape[-1]
    sums = averages * np.arange(n_tokens, 0, -1)
    heavy = np.argsort(-sums[:, : n_tokens - 50], axis=-1)[:, :49]
    recent = np.broadcast_to(np.arange(n_tokens - 50, n_tokens), (len(heavy), 50))
    np.testing.assert_array_equal(kept_by(kv), np.sort(np.concatenate([heavy, recent], -1), -1))


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_next_logits_equal_kvpress(model_name, name):
    """The next token sees the kept tokens and itself; StreamingLLM's at renumbered positions."""
    with np.load(DATA / f"{model_name}.npz") as inputs:
        ids, next_ids, n_kept = inputs["ids"], inputs["next_ids"], int(inputs["n_kept@0.8"])
    method = dataclasses.replace(METHODS[name](n_kept), budget=n_kept + 1)
    press = "streaming_llm_rerotated" if name == "streaming_llm" else name
    with np.load(DATA / f"{model_name}_presses.npz") as out:
        expected = out[f"{press}@0.8/next_logits"][0]
    model = kvjax.load(DATA / model_name, dtype="float32")
    _, state = kvjax.prefill(model, ids[None], method, room=1)
    logits, _ = kvjax.decode_step(model, next_ids[:1], state, method)
    np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=1e-4)
