"""Thresholds are exact quantiles, survive interrupts, and are refined at one sparsity."""

import dataclasses
import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from kvjax.cache import Layer
from kvjax.calibrate import activations, chess, quantiles, refine_thresholds
from kvjax.prefill_attention import attend_prompt, logits
from kvjax.sparsity.cats import Cats
from kvjax.sparsity.chess import Chess
from kvjax.sparsity.teal import Teal
from kvjax.thresholds import Site
from tests.tiny_models import byte_tokenizer, tiny

MODEL = tiny(byte_tokenizer())
DOCUMENTS = np.random.default_rng(0).integers(0, 256, (40, 128)).astype(np.int32)
METHOD = Chess(0.5, plus=True)


@given(
    arrays(np.float32, st.integers(1, 60), elements=st.floats(0, 2.0**99, width=32)),
    st.floats(0, 1, exclude_max=True),
)
def test_a_quantile_is_the_value_of_its_rank(values, share):
    place = quantiles.bin_of(np.asarray(quantiles.coarse(jnp.asarray(values))), share)
    bins = jnp.array([-1, place[0]])
    ours = quantiles.value_of(place, np.asarray(quantiles.fine(jnp.asarray(values), bins))[1])
    assert ours == np.sort(values)[int(share * values.size)]


def test_a_quantile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        quantiles.bin_of(np.zeros(quantiles.N_COARSE, np.int64), 0.5)


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = chess.calibrate(MODEL, DOCUMENTS, tmp_path / "whole", METHOD)
    run, left = activations.run, 60  # of 3 passes over 40 documents

    def stops(*args, **options):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return run(*args, **options)

    monkeypatch.setattr(activations, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        chess.calibrate(MODEL, DOCUMENTS, tmp_path / "parts", METHOD)
    left = 1000
    ours = chess.calibrate(MODEL, DOCUMENTS, tmp_path / "parts", METHOD)
    assert 1000 - left == 120 - 40 - 16  # one pass and two checkpoints were stored
    for a, b in zip(ours.layers, whole.layers, strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)
    left_over = sorted(p.name for p in (tmp_path / "parts").iterdir())
    assert left_over == ["calibration.json", "measured.json", "thresholds"]


def test_a_folder_of_another_calibration_is_refused(tmp_path, monkeypatch):
    def stops(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantiles, "value_of", stops)
    with pytest.raises(KeyboardInterrupt):
        chess.calibrate(MODEL, DOCUMENTS, tmp_path, METHOD)
    with pytest.raises(ValueError, match="another method"):
        chess.calibrate(MODEL, DOCUMENTS, tmp_path, Chess(0.6, plus=True))
    with pytest.raises(ValueError, match="another text"):
        chess.calibrate(MODEL, DOCUMENTS[::-1].copy(), tmp_path, METHOD)


def test_a_calibration_that_has_ended_is_returned_and_not_written_over(tmp_path, monkeypatch):
    whole = chess.calibrate(MODEL, DOCUMENTS, tmp_path, METHOD)
    monkeypatch.setattr(activations, "run", None)  # nothing is read again
    again = chess.calibrate(MODEL, DOCUMENTS, tmp_path, METHOD)
    for x, y in zip(jax.tree.leaves(again.layers), jax.tree.leaves(whole.layers), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="another method in"):
        chess.calibrate(MODEL, DOCUMENTS, tmp_path, Cats(0.5))
    assert Chess.load(tmp_path, MODEL).method == METHOD


def test_documents_that_do_not_do_are_refused(tmp_path):
    with pytest.raises(ValueError, match="4,096 tokens, got 3,968"):
        chess.calibrate(MODEL, DOCUMENTS[:31], tmp_path, METHOD)
    with pytest.raises(ValueError, match="fit the context"):
        chess.calibrate(MODEL, np.zeros((10, 500), np.int32), tmp_path, METHOD)
    (found,) = chess.closed_form(chess.Passes(MODEL, DOCUMENTS), [METHOD])
    with pytest.raises(ValueError, match="with a dense model"):
        chess.calibrate(found.apply(MODEL), DOCUMENTS, tmp_path, METHOD)


@pytest.mark.parametrize("method", [METHOD, Teal(0.5)], ids=str)
def test_refinement_loses_less_at_the_same_sparsity(method, tmp_path):
    closed = chess.calibrate(MODEL, DOCUMENTS, tmp_path / "closed", method)
    ours = chess.calibrate(MODEL, DOCUMENTS, tmp_path / "refined", method, refine=30)
    seen = json.loads((tmp_path / "refined" / "measured.json").read_text())
    assert len(seen["kl"]) == len(seen["sparsity"]) == 30
    losses = []
    for found in (closed, ours):
        dense, sparse = MODEL.logits(DOCUMENTS[:8]), found.apply(MODEL).logits(DOCUMENTS[:8])
        losses.append(float(refine_thresholds._kl(dense, sparse)))
    assert losses[1] < 0.8 * losses[0]
    passes = chess.Passes(MODEL, DOCUMENTS)
    again = chess.rescaled(passes, ours)  # at its sparsity already
    for a, b in zip(again.layers, ours.layers, strict=True):
        for site in a:
            np.testing.assert_allclose(a[site].level, b[site].level, rtol=1e-5)


def test_layers_share_a_sparsity_once_refined(tmp_path):
    ours = chess.calibrate(MODEL, DOCUMENTS, tmp_path, METHOD, refine=30)
    _, seen = activations.run(MODEL, DOCUMENTS[:8], _all)
    shares, weights = [], []
    for layer, found in zip(ours.layers, seen, strict=True):
        for site, t in layer.items():
            shares.append(float(jnp.mean(t(found[site]) == 0)))
            weights.append(site.rows(MODEL.config) * site.row_weights(MODEL.config))
    assert np.ptp(shares) > 0.05
    assert abs(np.average(shares, weights=weights) - 0.5) < 0.02


def _all(logits, seen):
    return logits, seen


def test_refinement_needs_text_to_hold_out():
    (found,) = chess.closed_form(chess.Passes(MODEL, DOCUMENTS), [METHOD])
    with pytest.raises(ValueError, match="refinement needs 3 pieces"):
        refine_thresholds.refine(MODEL, DOCUMENTS[:2], found, n_steps=1, seed=0)


def test_gradients_of_a_prompts_attention_are_those_of_its_equation():
    keys = jax.random.split(jax.random.key(0), 4)
    layer = Layer.of(MODEL.config, 0)
    q = jax.random.normal(keys[0], (2, 12, 2, 2, 8))
    k, v = (jax.random.normal(key, (2, 2, 16, 8)) for key in keys[1:3])
    when, pos = jnp.broadcast_to(jnp.arange(16), (2, 2, 16)), jnp.broadcast_to(jnp.arange(12), (2, 12))
    mass = jnp.where(when < 14, 1.0, 0.0)
    change = jax.random.normal(keys[3], q.shape)

    def ours(q, k, v):
        return jnp.vdot(attend_prompt(q, k, v, when, mass, pos, layer=layer), change)

    def theirs(q, k, v):
        rows = jnp.moveaxis(q, 1, 3).reshape(2, 2, 24, 8)
        p = jax.nn.softmax(logits(layer, rows, jnp.tile(pos, (1, 2)), k, when, mass))
        out = jnp.einsum("bkxs,bksd->bkxd", p, v).reshape(2, 2, 2, 12, 8)
        return jnp.vdot(jnp.moveaxis(out, 3, 1), change)

    for a, b in zip(*(jax.grad(f, (0, 1, 2))(q, k, v) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_chess_errs_less_than_cats_on_a_real_model(smollm2):
    """The output of each feed-forward block, at equal sparsity, on text that no threshold was made from."""
    from experiments.chess_quality import _ffn_error, _ffn_inputs
    from kvjax import text

    config = dataclasses.replace(smollm2.config, n_layers=12, layer_windows=(None,) * 12)  # the first
    model = dataclasses.replace(smollm2, config=config)
    documents = text.documents(model.tokenizer, (text.PROSE,), 5, 512, 0)
    passes = chess.Passes(model, documents[:4])
    inputs = activations.run(model, documents[4:], _ffn_inputs)
    errors = []
    for found in chess.closed_form(passes, [Chess(0.5), Cats(0.5)]):
        layers = zip(inputs, found.layers, strict=True)
        errors.append(
            [
                float(_ffn_error(x, model.params[f"layer_{i}"]["ffn"], dict(layer), config=config))
                for i, (x, layer) in enumerate(layers)
            ]
        )
    assert np.mean(errors[0]) < np.mean(errors[1])
    assert np.mean(np.less(*errors)) > 0.6  # and in most layers
    assert Site.FFN_GATE in found.layers[0]
