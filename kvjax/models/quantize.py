"""Stores a model's projections as int8 codes, with a scale for each output channel.

    scale_o = max_i |W_io| / 127      code_io = round(W_io / scale_o)      y_o = scale_o · Σ_i x_i code_io

Embeddings, norms and biases stay as they are. Decode steps of few rows read the codes (`spvmm`, `vmmsp`);
prompts are multiplied by codes converted to the model's type, one projection at a time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from kvjax.model import Model

__all__ = ["quantize"]


def quantize(model: Model) -> Model:
    """Returns the model with int8 projections; a given model's weights are shared where they stay.

    Raises:
        ValueError: for a model that is quantised, has thresholds, or is spread over devices.

    Cost: halves the bytes of the projections of a bfloat16 model.

    Example:
        >>> import kvjax
        >>> model = quantize(kvjax.load("smollm2-135m"))
        >>> kvjax.generate(model, "The capital of France is", max_new_tokens=2)[0].text
        ' Paris.'
    """
    if model.mesh is not None or model.thresholds is not None or _has_codes(model.params):
        raise ValueError(
            f"a model is quantised as it was loaded, got {model.name!r} with codes, thresholds or several "
            "devices: quantise first"
        )
    return dataclasses.replace(model, params=_quantized(model.params))


def _has_codes(tree: Any) -> bool:
    return any(x.dtype == jnp.int8 for x in jax.tree.leaves(tree))


def _quantized(tree: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, x in tree.items():
        if isinstance(x, Mapping):
            found[name] = _quantized(x)
        elif name == "kernel":
            found["kernel"], found["kernel_scale"] = _codes(x)
        else:
            found[name] = x
    return found


@jax.jit
def _codes(kernel: Float[Array, "M F"]) -> tuple[Int8[Array, "M F"], Float[Array, "1 F"]]:
    """Returns codes and scales; an output without weights has the scale 1."""
    most = jnp.max(jnp.abs(kernel.astype(jnp.float32)), axis=0, keepdims=True)
    scale = jnp.where(most > 0, most / 127, 1.0)
    return jnp.round(kernel.astype(jnp.float32) / scale).astype(jnp.int8), scale
