"""Makes decoders of a published shape without its checkpoint: as shapes alone, or with random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvjax.cache import KV
from kvjax.model import Model
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.states import State

__all__ = ["SHAPES", "abstract", "config_of", "occupied", "random"]

_LLAMA = {
    "family": "llama",
    "n_kv_heads": 8,
    "head_dim": 128,
    "context_length": 131072,
    "rope": RopeConfig(base=5e5, scaling="llama3", factor=8.0, original_context=8192),
    "norm_eps": 1e-5,
    "query_scale": 128**-0.5,
    "tied_embeddings": False,
}
_8B = {"vocab_size": 128256, "width": 4096, "ffn_width": 14336, "n_layers": 32, "n_heads": 32}
_TINY = {"vocab_size": 512, "width": 128, "ffn_width": 256, "n_layers": 2, "n_heads": 16}
_QWEN = {
    "family": "qwen2",
    "vocab_size": 151936,
    "width": 1536,
    "ffn_width": 8960,
    "n_layers": 28,
    "n_heads": 12,
    "n_kv_heads": 2,
    "rope": RopeConfig(base=1e6),
    "norm_eps": 1e-6,
    "qkv_bias": True,
    "tied_embeddings": True,
}
_LONGCHAT = {
    "vocab_size": 32000,
    "width": 4096,
    "ffn_width": 11008,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "rope": RopeConfig(base=1e4, scaling="linear", factor=8.0),
    "context_length": 32768,
}
SHAPES = {"llama-3.1-8b": _8B, "longchat-7b": _LONGCHAT, "qwen2.5-1.5b": _QWEN, "tiny": _TINY}


def config_of(shape: str, n_layers: int | None = None) -> ModelConfig:
    """Returns the configuration of a shape by name, with fewer layers if asked.

    Raises:
        ValueError: for an unknown name, or fewer than one layer.
    """
    if shape not in SHAPES:
        raise ValueError(f"a shape is one of {', '.join(SHAPES)}, got {shape!r}")
    sizes = SHAPES[shape] | ({} if n_layers is None else {"n_layers": n_layers})
    if sizes["n_layers"] < 1:
        raise ValueError(f"a model has at least 1 layer, got {n_layers=}")
    return ModelConfig(**(_LLAMA | sizes), layer_windows=(None,) * sizes["n_layers"])


def abstract(name: str, config: ModelConfig) -> Model:
    """Returns a model in bfloat16 whose parameters are shapes."""
    params: dict = {}
    for path, shape in config.param_shapes().items():
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32 if leaf == "scale" else jnp.bfloat16)
    return Model(name, config, params, None, jnp.dtype("bfloat16"))


def random(name: str, config: ModelConfig, seed: int) -> Model:
    """Returns a model in bfloat16 with random weights, made on the device; norms scale by 1."""
    model = abstract(name, config)
    shapes, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    params = [
        jnp.ones(x.shape, x.dtype) if x.dtype == jnp.float32 else _normal(key, x.shape, x.dtype)
        for key, x in zip(keys, shapes, strict=True)
    ]
    return dataclasses.replace(model, params=tree.unflatten(params))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5


def occupied(state: State, n: int, seed: int) -> State:
    """Returns a state as if n tokens of random keys and values had been read. Consumes the given one."""
    keys = jax.random.split(jax.random.key(seed), len(state))
    return tuple(_fill(kv, key, n) for kv, key in zip(state, keys, strict=True))


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0, keep_unused=True)  # else a second cache
def _fill(kv: KV, key: jax.Array, n: int) -> KV:
    keys, values = (jax.random.normal(k, kv.k.shape, kv.k.dtype) for k in jax.random.split(key))
    slot = jnp.concatenate([jnp.arange(size, dtype=jnp.int32) for size in kv.slots])
    return kv.replace(
        k=keys,
        v=values,
        pos=jnp.broadcast_to(jnp.where(slot < n, slot, 0), kv.pos.shape),
        mass=jnp.broadcast_to((slot < n).astype(jnp.float32), kv.mass.shape),
        fill=jnp.full_like(kv.fill, n),
        seen=jnp.full_like(kv.seen, n),
    )
