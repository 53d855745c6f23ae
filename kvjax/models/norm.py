"""Norms of rows: alone, and of a residual stream that something is added to."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.sharding import Mesh
from pallas_kernels.add_norm import add_norm
from pallas_kernels.add_norm.reference import normed

__all__ = ["AddNorm", "Norm"]


class Norm(nn.Module):
    """Divides by the root mean square and scales; computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns x normalised over its last axis."""
        return normed(x, _scale(self, x), self.eps)


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
        return x, normed(x, scale, self.eps)


def _scale(module: nn.Module, x: Array) -> Array:
    return module.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
