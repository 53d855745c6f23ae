"""What a compiled program of a model is: its sizes and its methods, and what runs in it."""

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array

from kvjax import sharding
from kvjax.cache import KV
from kvjax.method import CacheMethod
from kvjax.methods import per_layer
from kvjax.model import Model
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

__all__ = ["Program", "compressed"]


@dataclass(frozen=True)
class Program:
    """What a compiled program depends on beside shapes; equal ones compile once."""

    config: ModelConfig
    dtype: Any
    methods: tuple[CacheMethod, ...]  # one per layer
    mesh: Mesh | None = None  # devices that share the KV heads

    @classmethod
    def of(cls, model: Model, method: CacheMethod) -> "Program":
        """Returns the program of a model with a method."""
        return cls(model.config, model.dtype, per_layer(method, model.config), model.mesh)

    def run(self, variables: Any, *args: Any, **options: Any) -> tuple:
        """Applies the decoder to the variables of a model."""
        return Decoder(self.config, self.dtype, self.mesh).apply(variables, *args, self.methods, **options)


def compressed(kv: KV, q: Array, pos: Array, method: CacheMethod, mesh: Mesh | None) -> KV:
    """Returns one layer, compressed by its method after queries q at pos, on each device its own heads."""

    def step(method: CacheMethod, kv: KV, q: Array, pos: Array) -> tuple[KV, None]:
        return method.compress(kv, q, pos), None

    return sharding.over_heads(mesh, step, method, kv, q, pos)[0]
