"""Makes tiny random models, with and without a tokenizer of one token per byte."""

import jax.numpy as jnp
import numpy as np
import tokenizers

import kvjax
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, template="{% for m in messages %}<{{ m['content'] }}>{% endfor %}")


def tiny(
    tokenizer: Tokenizer | None = None, windows=(None, None), context: int = 256, n_kv_heads: int = 2
) -> kvjax.Model:
    """A random llama of 256 tokens, whose attention is far from uniform."""
    config = ModelConfig(
        family="llama",
        vocab_size=256,
        width=32,
        ffn_width=48,
        n_layers=len(windows),
        n_heads=2 * n_kv_heads,
        n_kv_heads=n_kv_heads,
        head_dim=8,
        context_length=context,
        rope=RopeConfig(),
        norm_eps=1e-5,
        query_scale=0.35,
        layer_windows=windows,
    )
    rng, params = np.random.default_rng(0), {}
    for path, shape in config.param_shapes().items():
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(rng.normal(leaf == "scale", 0.5, shape), jnp.float32)
    return kvjax.Model("tiny", config, params, tokenizer, jnp.dtype("float32"))
