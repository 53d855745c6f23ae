"""Runs a decoder-only transformer: parameters and KV state in, logits and KV state out.

One module for every family; what differs is in `ModelConfig`. The decoder calls the verbs of the
cache methods and never asks which method it is.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import cache, disk, tiers
from kvjax.attend import attend, held
from kvjax.cache import KV
from kvjax.method import CacheMethod
from kvjax.models.config import ModelConfig
from kvjax.prefill_attention import precision
from kvjax.shapes import Positions, Queries, Tokens
from kvjax.sharding import Mesh, over_heads
from pallas_kernels.add_norm import add_norm
from pallas_kernels.backend import target
from pallas_kernels.gate_up import gate_up
from pallas_kernels.sparse_matvec import MAX_BATCH
from pallas_kernels.spvmm import spvmm
from pallas_kernels.spvmm_each import spvmm_each
from pallas_kernels.vmmsp import vmmsp

__all__ = ["Decoder", "Record"]

_SMALL = 10_000_000  # elements of W below which XLA makes no product of one row


class Record(NamedTuple):
    """What one layer's attention was given: un-rotated queries, keys and values."""

    q: Queries
    k: Tokens
    v: Tokens


class Norm(nn.Module):
    """Divides by the root mean square and scales; computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns x normalised over its last axis."""
        return _normed(x, _scale(self, x), self.eps)


class AddNorm(nn.Module):
    """Adds to the residual stream, and norms the sum as `Norm` does.

    mesh: None where rows lie on one device: then a step is one kernel.
    """

    eps: float
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Array, y: Array | None) -> tuple[Array, Array]:
        """Returns x [B T M] with y added, if there is one, and the norm of that."""
        scale = _scale(self, x)
        if y is not None and x.shape[1] == 1 and self.mesh is None:
            x, norm = add_norm(x[:, 0], y[:, 0], scale, eps=self.eps)
            return x[:, None], norm[:, None]
        x = x if y is None else x + y
        return x, _normed(x, scale, self.eps)


def _scale(module: nn.Module, x: Array) -> Array:
    return module.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)


def _normed(x: Array, scale: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype)


class Linear(nn.Module):
    """Multiplies by a kernel [in, out] stored in the type of the model, or as int8 with a scale per output.

    With a threshold "in", what lies below it is left out of x. A kernel of which outputs are left out may
    lie the other way, as `kernel_t` [out, in].
    """

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array, *, sparse: bool = False, gate: Array | None = None) -> Array:
        """Returns x W + b in x's type, times the gate; float32 is computed as float32 on every device.

        sparse: x is mostly 0. gate: is mostly 0.
        """
        self.sow("activations", "in", x)
        level = None
        if (threshold := self.get_variable("thresholds", "in")) is not None:
            sparse = True
            if _is_step(x) and threshold.plain:
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
            y = _scaled(_product(x, kernel.astype(x.dtype)), scale)
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


def _product(x: Array, kernel: Array) -> Array:
    """Returns x W.

    Of one row and a small W, XLA for GPUs makes no product but multiplies element by element and
    adds up, fused into what reads it: in a scatter, one sum after the other. A second row, of zeros,
    keeps it a product.
    """
    alone = math.prod(x.shape[:-1]) == 1 and kernel.size < _SMALL and target().platform == "gpu"
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]) if alone else x
    y = jnp.dot(rows, kernel, precision=precision(x.dtype))
    return y[..., :1, :] if alone else y


class Attention(nn.Module):
    """Attends over the KV state of one layer, which it first gives the new tokens."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M"], pos: Positions, kv: KV, method: CacheMethod, compress: bool
    ) -> tuple[Array, KV, Record]:
        """Returns the attention output, the new state, and what was attended with."""
        c = self.config
        batch, length, _ = x.shape
        kv_width = c.n_kv_heads * c.head_dim
        names = {"q": c.n_heads * c.head_dim, "k": kv_width, "v": kv_width}
        linear = {name: Linear(width, c.qkv_bias, name=name) for name, width in names.items()}
        if (together := _sparse_step(self, x, names)) is not None:
            q, k, v = together
        else:
            q, k, v = (project(x) for project in linear.values())
        q = _queries(c, q)
        k, v = (y.reshape(batch, length, c.n_kv_heads, c.head_dim) for y in (k, v))
        if c.qk_norm:
            k = Norm(c.norm_eps, name="k_norm")(k)
        step = functools.partial(_attend_layer, compress=compress)
        kv, out = over_heads(self.mesh, step, method, kv, q, k, v, pos)
        out = Linear(c.width, c.o_bias, name="o")(out.reshape(batch, length, c.n_heads * c.head_dim))
        return out, kv, Record(q, k, v)


def _sparse_step(module: nn.Module, x: Array, names: Iterable[str]) -> list[Array] | None:
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


def _queries(c: ModelConfig, q: Float[Array, "B T N"]) -> Queries:
    """Returns the queries of an attention module, within which it is called, from their projection."""
    q = q.reshape(*q.shape[:2], c.n_kv_heads, c.group, c.head_dim)
    return Norm(c.norm_eps, name="q_norm")(q) if c.qk_norm else q


def _attend_layer(
    method: CacheMethod, kv: KV, q: Queries, k: Tokens, v: Tokens, pos: Positions, *, compress: bool
) -> tuple[KV, Queries]:
    """Does all that touches a layer's state: writes, attends, and lets the method compress."""
    kv, idx = cache.append(kv, k, v, pos)
    kv = method.observe(kv, q, k, pos, idx)
    kv, here, selection = held(kv, pos, method.select(kv, q, pos))
    out = attend(here, q, pos, selection)
    return method.compress(kv, q, pos) if compress and method.due(kv) is None else kv, out


class FeedForward(nn.Module):
    """Computes act(x W_gate) * (x W_up), then W_down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        """Returns the block's output."""
        c = self.config
        gate, up = Linear(c.ffn_width, name="gate"), Linear(c.ffn_width, name="up")
        down = Linear(c.width, name="down")
        threshold = self.get_variable("thresholds", "act")
        if threshold is not None and threshold.group == 1 and _is_unseen_step(self, x):
            return down(_gate_up(self.variables["params"], x, threshold, c.act), sparse=True)
        act = gate(x)
        act = nn.silu(act) if c.act == "silu" else nn.gelu(act, approximate=True)
        self.sow("activations", "act", act)
        if threshold is None:
            return down(act * up(x))
        return down(up(x, gate=threshold(act)), sparse=True)


def _gate_up(params: Mapping[str, Any], x: Array, threshold: Any, act: str) -> Array:
    """Returns the gate, without what is below its threshold, times up."""
    gate, up = params["gate"], params["up"]
    scales = (gate["kernel_scale"][0], up["kernel_scale"][0]) if "kernel_scale" in gate else None
    out = gate_up(
        x[:, 0], gate["kernel_t"], up["kernel_t"], threshold.level, threshold.weight, scales=scales, act=act
    )
    return out[:, None]


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a residual.

    What is added last is left to the next norm, which adds and norms at once.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Array, y: Array | None, pos: Positions, kv: KV, method: CacheMethod, compress: bool
    ) -> tuple[Array, Array, KV, Record]:
        """Returns the residual stream x and y, to be added to it; the new state; what it attended with."""
        c = self.config
        x, h = AddNorm(c.norm_eps, self.mesh, name="attn_norm")(x, y)
        y, kv, record = Attention(c, self.mesh, name="attn")(h, pos, kv, method, compress)
        y = Norm(c.norm_eps, name="post_attn_norm")(y) if c.post_norms else y
        x, h = AddNorm(c.norm_eps, self.mesh, name="ffn_norm")(x, y)
        y = FeedForward(c, name="ffn")(h)
        return x, Norm(c.norm_eps, name="post_ffn_norm")(y) if c.post_norms else y, kv, record


class Ask(nn.Module):
    """Computes the queries alone, with the parameters of an `Attention`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Queries:
        """Returns them un-rotated."""
        c = self.config
        return _queries(c, Linear(c.n_heads * c.head_dim, c.qkv_bias, name="q")(x))


class Foresight(nn.Module):
    """Guesses the queries of a layer from the input of the one before, with the parameters of a `Block`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Queries:
        """Returns them un-rotated."""
        return Ask(self.config, name="attn")(Norm(self.config.norm_eps, name="attn_norm")(x))


class Decoder(nn.Module):
    """The whole model. All settings beside arrays are static."""

    config: ModelConfig
    dtype: Any = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "B T"],
        pos: Positions,
        state: Sequence[KV],
        methods: tuple[CacheMethod, ...],
        *,
        compress: bool = False,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B Q V"], tuple[KV, ...], tuple[Record, ...]]:
        """Runs T tokens per row through every layer.

        Args:
            pos: rotary positions; -1 marks padding, which changes no state.
            state: one KV per layer, before these tokens.
            methods: one per layer.
            compress: let the methods compress after these tokens, but those that say when they are `due`.
            last_only: logits of the last token alone (Q = 1), else of all (Q = T).

        Returns: float32 logits, the new state, and per layer what attention was given.
        """
        c = self.config
        table = Embed(c.vocab_size, c.width, self.dtype, name="embed")()
        x = table[jnp.maximum(ids, 0)] * jnp.asarray(c.embed_scale, self.dtype)
        y, new_state, records = None, [], []
        for i in range(c.n_layers):
            if i + 1 < c.n_layers and x.shape[1] == 1 and disk.reads_ahead(state[i + 1]):
                x += self._foresee(i + 1, x if y is None else x + y, pos, state[i + 1], methods[i + 1])
            block = Block(c, self.mesh, name=f"layer_{i}")
            x, y, kv, record = block(x, y, pos, state[i], methods[i], compress)
            new_state.append(kv)
            records.append(record)
        x, y = (x[:, -1:], y[:, -1:]) if last_only else (x, y)
        _, x = AddNorm(c.norm_eps, self.mesh, name="final_norm")(x, y)
        logits = _unembed(x, table) if c.tied_embeddings else Linear(c.vocab_size, name="head")(x)
        logits = logits.astype(jnp.float32)
        if c.final_softcap is not None:
            logits = c.final_softcap * jnp.tanh(logits / c.final_softcap)
        return logits, tuple(new_state), tuple(records)

    def _foresee(self, index: int, x: Array, pos: Positions, kv: KV, method: CacheMethod) -> Array:
        """Has read what the next layer may ask its disk for: what it selects given this layer's input, x.

        Returns: a 0 that no compiler knows, for what follows to wait for.
        """
        layer = {kind: tree.get(f"layer_{index}", {}) for kind, tree in self.variables.items()}
        q = Foresight(self.config, parent=None).apply(layer, x)
        selection = method.select(kv, q, pos)
        idx = None if selection is None else jnp.where((pos >= 0)[..., None], selection.idx, -1)
        return tiers.expect(kv.tier, idx, kv.slots).astype(x.dtype)


class Embed(nn.Module):
    """Holds the embedding table."""

    vocab_size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self) -> Float[Array, "V M"]:
        """Returns the table."""
        return self.param(
            "embedding", nn.initializers.normal(0.02), (self.vocab_size, self.width), self.dtype
        )


def _unembed(x: Array, table: Array) -> Array:
    """Returns x Eᵀ, accumulated in float32."""
    return jnp.einsum(
        "btm,vm->btv", x, table, precision=precision(x.dtype), preferred_element_type=jnp.float32
    )
