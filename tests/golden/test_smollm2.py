"""SmolLM2 against what torch makes of the same weights."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import measure
from kvjax.methods.full import Full
from kvjax.replay import record

DATA = Path(__file__).parent / "data" / "smollm2"
REFERENCE = json.loads((DATA / "smollm2.json").read_text())
PROMPTS = [name for name in REFERENCE if not name.startswith("_")]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_give_the_reference_logits_and_tokens(smollm2, name):
    want = REFERENCE[name]
    ids = np.array(want["prompt_ids"], np.int32)[None]
    logits, state = kvjax.prefill(smollm2, ids, room=32)
    ours = np.asarray(logits)[0, want["top20_ids"]]
    np.testing.assert_allclose(ours, want["top20_logits"], atol=2e-4)
    np.testing.assert_allclose(np.asarray(logits).mean(), want["logits_mean"], atol=2e-4)
    np.testing.assert_allclose(np.asarray(logits).std(), want["logits_std"], atol=2e-4)
    free = np.full((1, 32), -1, np.int32)
    tokens, _, _, kept = kvjax.decode(smollm2, logits, state, Full(), free, keep_logits=True)
    best = np.sort(np.asarray(kept)[0], axis=-1)
    margins = best[:, -1] - best[:, -2]
    assert np.asarray(tokens)[0].tolist() == want["greedy32_ids"]
    np.testing.assert_allclose(margins, want["greedy32_top1_minus_top2"], atol=4e-4)


def test_mean_nll_of_the_licence(smollm2):
    with np.load(DATA / "smollm2_gpl3_2048_nll.npz") as saved:
        ids, want = saved["ids"], saved["nll"]
    logits = smollm2.logits(ids)
    ours = np.asarray(measure.nll(logits[0, :-1], jnp.asarray(ids[1:])))
    assert abs(ours.mean() - 2.9814) < 5e-4
    np.testing.assert_allclose(ours, want, atol=2e-3)


def test_layers_see_the_reference_keys_and_values(smollm2):
    """Un-rotated keys, rotated here, and values of layers 0, 14 and 29."""
    from kvjax.rope import rotate

    with np.load(DATA / "smollm2_france_layers.npz") as saved:
        want = dict(saved)
    ids = want["ids"].tolist()
    _, _, records = record(smollm2, [ids], room=0, chunk=8)
    for i, layer in enumerate((0, 14, 29)):
        k, v = (np.asarray(x)[0, -len(ids) :] for x in (records[layer].k, records[layer].v))
        pos = jnp.broadcast_to(jnp.arange(len(ids))[:, None], k.shape[:2])
        turned = np.asarray(rotate(jnp.asarray(k), pos, smollm2.config.rope_of(layer)))
        np.testing.assert_allclose(turned.swapaxes(0, 1), want["keys_rope_layers_0_14_29"][i], atol=2e-3)
        np.testing.assert_allclose(v.swapaxes(0, 1), want["values_layers_0_14_29"][i], atol=1e-3)


def test_prompts_of_different_lengths_share_a_batch(smollm2):
    names = ["france", "code", "passkey"]
    rows = [REFERENCE[name]["prompt_ids"] for name in names]
    done = kvjax.generate(smollm2, rows, max_new_tokens=12)
    for name, completion in zip(names, done, strict=True):
        assert list(completion.ids) == REFERENCE[name]["greedy32_ids"][: len(completion.ids)]
        assert len(completion.ids) == 12
