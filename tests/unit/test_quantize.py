"""Projections as int8 codes are what NumPy says, and the model with them is near the one without."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.model import fingerprint
from kvjax.models.quantize import quantize
from tests.tiny_models import byte_tokenizer, tiny

MODEL = tiny(byte_tokenizer())


def test_codes_are_as_numpy_rounds_them():
    ours = quantize(MODEL).params["layer_1"]["ffn"]["down"]
    w = np.float64(MODEL.params["layer_1"]["ffn"]["down"]["kernel"])
    scale = np.abs(w).max(0) / 127
    np.testing.assert_allclose(ours["kernel_scale"][0], scale, rtol=1e-6)
    assert ours["kernel"].dtype == jnp.int8
    assert np.abs(np.asarray(ours["kernel"]) - w / scale).max() <= 0.5 + 1e-4


def test_the_model_multiplies_by_what_the_codes_stand_for():
    codes = quantize(MODEL)
    params = {k: v for k, v in codes.params.items() if not k.startswith("layer_")}
    for i in range(2):
        layer = codes.params[f"layer_{i}"]
        params[f"layer_{i}"] = {
            part: {k: _whole(v) if isinstance(v, dict) else v for k, v in of.items()}
            for part, of in layer.items()
        }
    whole = type(MODEL)("whole", MODEL.config, params, MODEL.tokenizer, MODEL.dtype)
    ids = np.arange(40)[None]
    np.testing.assert_allclose(codes.logits(ids), whole.logits(ids), atol=1e-3)


def _whole(linear):
    if "kernel_scale" not in linear:
        return linear
    return {"kernel": linear["kernel"].astype(jnp.float32) * linear["kernel_scale"]}


def test_a_channel_without_weights_is_no_division_by_zero():
    params = {**MODEL.params, "layer_0": {**MODEL.params["layer_0"]}}
    ffn = {
        **params["layer_0"]["ffn"],
        "up": {"kernel": jnp.zeros_like(params["layer_0"]["ffn"]["up"]["kernel"])},
    }
    params["layer_0"]["ffn"] = ffn
    model = type(MODEL)("zeros", MODEL.config, params, MODEL.tokenizer, MODEL.dtype)
    assert bool(jnp.isfinite(quantize(model).logits(np.arange(9)[None])).all())


def test_a_fingerprint_is_that_of_the_model_without_codes():
    assert fingerprint(quantize(MODEL)) == fingerprint(MODEL)


def test_codes_are_not_quantised_again():
    with pytest.raises(ValueError, match="quantised as it was loaded"):
        quantize(quantize(MODEL))
