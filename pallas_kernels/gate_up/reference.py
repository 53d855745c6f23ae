"""The two products from their equation, in float32: the specification of the kernels."""

import functools

import jax
import jax.numpy as jnp

__all__ = ["ACTS", "gates", "run"]

ACTS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def gates(x, gate_t, level, weight, scale, *, act: str):
    """Returns act(scale·x·gate_tᵀ), 0 where it is below its level: [B F]."""
    gate = _product(x, gate_t, scale).astype(x.dtype)
    gate = ACTS[act](gate.astype(jnp.float32)).astype(x.dtype)
    score = jnp.abs(gate.astype(jnp.float32))
    return jnp.where((score if weight is None else score * weight) < level, 0, gate)


def run(x, gate_t, up_t, level, weight, scales, *, act: str):
    """Returns the gates times scale·x·up_tᵀ, and 0 where they are: [B F]."""
    gate_scale, up_scale = scales or (None, None)
    gate = gates(x, gate_t, level, weight, gate_scale, act=act)
    up = _product(x, up_t, up_scale)
    return jnp.where(gate != 0, gate.astype(jnp.float32) * up, 0.0).astype(x.dtype)


def _product(x, w_t, scale):
    x, w_t = x.astype(jnp.float32), w_t.astype(jnp.float32)
    out = jnp.einsum("bm,fm->bf", x, w_t, precision=jax.lax.Precision.HIGHEST)
    return out if scale is None else out * scale
