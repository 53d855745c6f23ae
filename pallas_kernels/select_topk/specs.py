"""The cases of top-k selection that are tested, timed and tuned."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.op import Op, Spec
from pallas_kernels.select_topk import gpu, select_topk

__all__ = ["DATA", "OP", "TopkSpec"]


def _normal(key, shape):
    return jax.random.normal(key, shape)


def _ties(key, shape):
    """A hundred distinct scores, as of tokens that share codewords."""
    return jnp.round(jax.random.normal(key, shape) * 12) / 12


def _clumps(key, shape):
    """The largest scores lie together in one stretch of the row."""
    at = jnp.arange(shape[-1]) * 16 // shape[-1]
    return jax.random.normal(key, shape) + jnp.where(at == 11, 6.0, 0.0)


def _sparse(key, shape):
    """Nine scores in ten are -inf, and the first row has none above it."""
    alive = jax.random.uniform(jax.random.fold_in(key, 1), shape) < 0.1
    alive = alive.reshape(-1, shape[-1]).at[0].set(False).reshape(shape)
    return jnp.where(alive, jax.random.normal(key, shape), -jnp.inf)


DATA: Mapping[str, Callable] = {"normal": _normal, "ties": _ties, "clumps": _clumps, "sparse": _sparse}


@dataclass(frozen=True)
class TopkSpec(Spec):
    """Sizes in the alphabet; data: one of `DATA`."""

    rows: tuple[int, ...]
    slots: int
    k: int
    dtype: str = "float32"
    data: str = "normal"
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example 8x4-s4096-top64-normal-float32."""
        rows = "x".join(map(str, self.rows)) or "1"
        return f"{rows}-s{self.slots}-top{self.k}-{self.data}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes scores."""
        return {"scores": DATA[self.data](key, (*self.rows, self.slots)).astype(self.dtype)}

    def options(self) -> dict[str, Any]:
        """Returns k."""
        return {"k": self.k}

    def bytes(self) -> int:
        """Returns the bytes of the scores, read once, and of the indices."""
        n_rows = math.prod(self.rows)
        return n_rows * (self.slots * jnp.dtype(self.dtype).itemsize + 4 * self.k)

    def limit(self) -> float:
        """Indices are the reference's."""
        return 0.0


_TIMED = ("bench", "tune")

SPECS = (
    TopkSpec((), 300, 1),
    TopkSpec((2, 2), 77, 77, "float16"),
    TopkSpec((2,), 9001, 270),
    TopkSpec((2,), 10000, 600, data="ties"),
    TopkSpec((1,), 16384, 2000, data="clumps"),
    TopkSpec((2,), 12000, 1500, "bfloat16", data="sparse"),
    TopkSpec((64,), 131072, 2048, uses=_TIMED),
    TopkSpec((64,), 131072, 2048, data="clumps", uses=("bench",)),
    TopkSpec((64,), 131072, 2048, data="ties", uses=("bench",)),
    TopkSpec((8,), 131072, 2048, uses=_TIMED),
    TopkSpec((256,), 32768, 983, uses=_TIMED),
    TopkSpec((256,), 2048, 64, uses=_TIMED),
)


def _candidates(spec: TopkSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(sample, block, parts, width, warps, row_warps)
        for sample in (2048, 4096)
        for block in (1024, 2048, 4096)
        for parts, width in ((16, 256), (32, 128), (32, 256), (64, 128))
        for warps in (4, 8)
        for row_warps in (8, 16)
    ]


OP = Op(select_topk, SPECS, candidates=_candidates)
