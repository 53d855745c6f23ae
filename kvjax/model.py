"""Holds a loaded model: its configuration, parameters and tokenizer."""

import hashlib
import os
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kvjax.models.config import ModelConfig
from kvjax.models.hub import cache_dir, fetch
from kvjax.models.tokenizer import Tokenizer, load_tokenizer
from kvjax.models.weights import load_weights

__all__ = ["Model", "fingerprint", "load"]


@dataclass(frozen=True)
class Model:
    """A decoder with its parameters; made by `kvjax.load`.

    mesh: the devices that the parameters are spread over, see `kvjax.sharding`; None for one.
    thresholds: which activations are left out, see `kvjax.thresholds`; None for none.
    """

    name: str
    config: ModelConfig
    params: dict = field(repr=False)
    tokenizer: Tokenizer | None = field(repr=False)
    dtype: Any = jnp.float32
    mesh: Mesh | None = field(default=None, repr=False)
    thresholds: dict | None = field(default=None, repr=False)

    @property
    def variables(self) -> dict:
        """All that the decoder reads, by collection."""
        more = {} if self.thresholds is None else {"thresholds": self.thresholds}
        return {"params": self.params, **more}

    def logits(self, ids: Any) -> Float[Array, "B T V"]:
        """Returns the logits after every token of `ids` [B T] (or [T]), with the full cache.

        Raises:
            ValueError: for no tokens, ids outside the vocabulary, or more tokens than the context.

        Example:
            >>> import kvjax
            >>> model = kvjax.load("smollm2-135m")
            >>> model.logits(model.tokenizer.encode("The capital of France is")).shape
            (1, 5, 49152)
        """
        from kvjax.reading import prompt_logits

        return prompt_logits(self, np.atleast_2d(np.asarray(ids)))


def load(name: str | os.PathLike = "smollm2-135m", dtype: Any = None) -> Model:
    """Loads a model by name, from `hf:org/name`, from a Hugging Face folder, or from a GGUF file.

    Args:
        dtype: "float32" or "bfloat16"; None takes float32 on CPU and bfloat16 elsewhere.

    Raises:
        ValueError: for an unknown name or dtype, or a damaged file.
        OSError: without network, when the model is not in the cache.

    Example:
        >>> import kvjax
        >>> kvjax.load("smollm2-135m").config.n_layers
        30
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    known = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}
    if dtype not in known and dtype not in known.values():
        raise ValueError(f"a model is loaded in float32 or bfloat16, got {dtype=}")
    dtype = jnp.dtype(dtype)
    keep_compiled()
    path = fetch(name)
    config, params = load_weights(path, dtype)
    return Model(str(name), config, params, load_tokenizer(path), dtype)


def fingerprint(model: Model) -> str:
    """Returns a name for a model's configuration and weights, the same in float32 and bfloat16.

    Of the weights it takes the vectors: norms and biases.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    for path, x in sorted(jax.tree_util.tree_leaves_with_path(model.params), key=lambda leaf: str(leaf[0])):
        if x.ndim == 1:
            digest.update(f"{path}".encode())
            digest.update(np.asarray(x.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]


def keep_compiled() -> None:
    """Keeps compiled programs on disk between processes, unless JAX is told where already."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
