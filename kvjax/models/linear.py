"""Projections, and what decode steps leave out of them: one by one, or several in one kernel.

A kernel of several does what its `Linear`s would, with their parameters and thresholds.
"""

import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.prefill_attention import precision
from pallas_kernels.backend import target
from pallas_kernels.gate_up import gate_up
from pallas_kernels.sparse_matvec import MAX_BATCH
from pallas_kernels.spvmm import spvmm
from pallas_kernels.spvmm_each import spvmm_each
from pallas_kernels.vmmsp import vmmsp

__all__ = ["Linear", "sparse_gate_up", "sparse_step"]

_SMALL = 10_000_000  # elements of W below which XLA makes no product of one row


class Linear(nn.Module):
    """Multiplies by a kernel [in, out] stored in the type of the model, or as int8 with a scale per output.

    With a threshold "in", what lies below it is left out of x. A kernel of which outputs are left out may
    lie the other way, as `kernel_t` [out, in].
    """

    features: int
    bias: bool = False
    wide: bool = False  # the result stays in float32, as it is summed up, where the kernel is not sparse

    @nn.compact
    def __call__(self, x: Array, *, sparse: bool = False, gate: Array | None = None) -> Array:
        """Returns x W + b in x's type, times the gate; float32 is computed as float32 on every device.

        sparse: x is mostly 0. gate: is mostly 0.
        """
        self.sow("activations", "in", x)
        level = None
        if (threshold := self.get_variable("thresholds", "in")) is not None:
            sparse = True
            if _is_step(x) and threshold.plain and self.has_variable("params", "kernel"):
                level = threshold.level  # which the kernel compares with
            else:
                x = threshold(x)
        normal, scale = nn.initializers.lecun_normal(), None
        if self.has_variable("params", "kernel_scale"):
            scale = self.param("kernel_scale", nn.initializers.ones, (1, self.features), jnp.float32)[0]
        if self.has_variable("params", "kernel_t"):
            kernel = self.param("kernel_t", normal, (self.features, x.shape[-1]), x.dtype)
            return _turned(x, gate, kernel, scale)
        kernel = self.param("kernel", normal, (x.shape[-1], self.features), x.dtype)
        if (sparse or scale is not None) and _is_step(x):
            y = spvmm(x[:, 0], kernel, level, scale=scale)[:, None]
        else:
            y = _scaled(_product(x, kernel.astype(x.dtype), jnp.float32 if self.wide else None), scale)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), x.dtype)
        self.sow("activations", "out", y)
        return y if gate is None else gate * y


def _is_step(x: Array) -> bool:
    """Returns whether x [B T M] is a decode step of few rows, on a device with kernels that skip weights."""
    return x.shape[1] == 1 and x.shape[0] <= MAX_BATCH and target().platform != "cpu"


def _is_unseen_step(module: nn.Module, x: Array) -> bool:
    """Returns whether x is such a step, and nobody watches activations, which one kernel does not show."""
    return _is_step(x) and not module.is_mutable_collection("activations")


def _turned(x: Array, gate: Array | None, kernel: Array, scale: Array | None) -> Array:
    """Returns x W, times the gate if there is one, of W that lies as [out, in]."""
    if gate is not None and _is_step(x):
        return vmmsp(x[:, 0], gate[:, 0], kernel, scale=scale)[:, None]
    kernel = kernel.astype(x.dtype)
    y = _scaled(jnp.einsum("btm,fm->btf", x, kernel, precision=precision(x.dtype)), scale)
    return y if gate is None else gate * y


def _scaled(y: Array, scale: Array | None) -> Array:
    return y if scale is None else (y * scale).astype(y.dtype)


def _product(x: Array, kernel: Array, dtype: Any = None) -> Array:
    """Returns x W, in x's type if not in another.

    Of one row and a small W, XLA for GPUs makes no product but multiplies element by element and
    adds up, fused into what reads it: in a scatter, one sum after the other. A second row, of zeros,
    keeps it a product.
    """
    alone = math.prod(x.shape[:-1]) == 1 and kernel.size < _SMALL and target().platform == "gpu"
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]) if alone else x
    y = jnp.dot(rows, kernel, precision=precision(x.dtype), preferred_element_type=dtype)
    return y[..., :1, :] if alone else y


def sparse_step(module: nn.Module, x: Array, names: Iterable[str]) -> list[Array] | None:
    """Returns what a module's projections make of a step, in one launch.

    None where no activation is left out, where a kernel does not see how, and where they are watched.
    """
    thresholds = [(module.get_variable("thresholds", name) or {}).get("in") for name in names]
    known = [t for t in thresholds if t is not None]
    if not known or not all(t.plain for t in known) or not _is_unseen_step(module, x):
        return None
    params = [module.variables["params"][name] for name in names]
    scales = [p["kernel_scale"][0] if "kernel_scale" in p else None for p in params]
    levels = [None if t is None else t.level for t in thresholds]
    out = spvmm_each(x[:, 0], [p["kernel"] for p in params], levels, scales=scales)
    return [y[:, None] + p["bias"] if "bias" in p else y[:, None] for y, p in zip(out, params, strict=True)]


def sparse_gate_up(module: nn.Module, x: Array, act: str) -> Array | None:
    """Returns the gate of a step, without what is below its threshold, times up, of a block, in one launch.

    None where no gate is left out, where a kernel does not see how, and where activations are watched.
    """
    threshold = module.get_variable("thresholds", "act")
    if threshold is None or threshold.group > 1 or threshold.temperature is not None:
        return None
    inputs = any(module.get_variable("thresholds", name) is not None for name in ("gate", "up"))
    if inputs or not _is_unseen_step(module, x):
        return None
    gate, up = (module.variables["params"][name] for name in ("gate", "up"))
    scales = (gate["kernel_scale"][0], up["kernel_scale"][0]) if "kernel_scale" in gate else None
    out = gate_up(
        x[:, 0], gate["kernel_t"], up["kernel_t"], threshold.level, threshold.weight, scales=scales, act=act
    )
    return out[:, None]
