"""Runs a decoder-only transformer: parameters and KV state in, logits and KV state out.

One module for every family; what differs is in `ModelConfig`. The decoder calls the verbs of the
cache methods and never asks which method it is.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import cache, disk, tiers
from kvjax.attend import attend_rotated, held
from kvjax.cache import KV
from kvjax.method import CacheMethod
from kvjax.models.config import ModelConfig
from kvjax.models.linear import Linear, sparse_gate_up, sparse_step
from kvjax.models.norm import AddNorm, Norm
from kvjax.prefill_attention import precision
from kvjax.shapes import Positions, Queries, Tokens
from kvjax.sharding import Mesh, over_heads

__all__ = ["Decoder", "Record"]


class Record(NamedTuple):
    """What one layer's attention was given: un-rotated queries, keys and values."""

    q: Queries
    k: Tokens
    v: Tokens


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
        if (together := sparse_step(self, x, names)) is not None:
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


def _queries(c: ModelConfig, q: Float[Array, "B T N"]) -> Queries:
    """Returns the queries of an attention module, within which it is called, from their projection."""
    q = q.reshape(*q.shape[:2], c.n_kv_heads, c.group, c.head_dim)
    return Norm(c.norm_eps, name="q_norm")(q) if c.qk_norm else q


def _attend_layer(
    method: CacheMethod, kv: KV, q: Queries, k: Tokens, v: Tokens, pos: Positions, *, compress: bool
) -> tuple[KV, Queries]:
    """Does all that touches a layer's state: writes, attends, and lets the method compress."""
    kv, idx, turned = cache.enter(kv, q, k, v, pos)
    kv = method.observe(kv, q, k, pos, idx)
    kv, here, selection = held(kv, pos, method.select(kv, q, pos))
    out = attend_rotated(here, turned, pos, selection)
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
        if (together := sparse_gate_up(self, x, c.act)) is not None:
            return down(together, sparse=True)
        act = gate(x)
        act = nn.silu(act) if c.act == "silu" else nn.gelu(act, approximate=True)
        self.sow("activations", "act", act)
        if (threshold := self.get_variable("thresholds", "act")) is None:
            return down(act * up(x))
        return down(up(x, gate=threshold(act)), sparse=True)


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
        logits = _unembed(x, table) if c.tied_embeddings else Linear(c.vocab_size, wide=True, name="head")(x)
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
