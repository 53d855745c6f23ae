"""The cases of bound scores that are tested, timed and tuned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.bound_scores import bound_scores, gpu
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "ScoresSpec"]


@dataclass(frozen=True)
class ScoresSpec(Spec):
    """Sizes in the alphabet. full: no empty blocks. lower: both bounds."""

    batch: int
    group: int
    head_dim: int
    n_blocks: tuple[int, ...]
    dtype: str = "bfloat16"
    q_dtype: str | None = None  # None: as dtype
    full: bool = False
    lower: bool = True
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b2-k8-g4-d128-n4096-bfloat16."""
        most, mean = max(self.n_blocks), sum(self.n_blocks) // len(self.n_blocks)
        n = f"n{most}" if most == mean else f"n{most}of{mean}"
        kind = self.dtype if self.q_dtype is None else f"{self.dtype}-q{self.q_dtype}"
        what = "-lower" if self.lower else ""
        return f"b{self.batch}-k{len(self.n_blocks)}-g{self.group}-d{self.head_dim}-{n}-{kind}{what}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs. Unless full, a fifth of the blocks is empty, and a query has a channel of 0."""
        keys = jax.random.split(key, 3)
        shape = (self.batch, sum(self.n_blocks), self.head_dim)
        q = jax.random.normal(keys[0], (self.batch, len(self.n_blocks), self.group, self.head_dim))
        ends = jax.random.normal(keys[1], (2, *shape))
        low, high = jnp.min(ends, axis=0), jnp.max(ends, axis=0)
        if not self.full:
            empty = jax.random.uniform(keys[2], shape[:2]) < 0.2
            low, high = (jnp.where(empty[..., None], x, y) for x, y in ((jnp.inf, low), (-jnp.inf, high)))
            q = q.at[..., 0].set(0.0)
        low, high = low.astype(self.dtype), high.astype(self.dtype)
        return {"q": q.astype(self.q_dtype or self.dtype), "low": low, "high": high}

    def options(self) -> dict[str, Any]:
        """Returns the blocks per head, and whether lower bounds are wanted."""
        return {"n_blocks": self.n_blocks, "lower": self.lower}

    def bytes(self) -> int:
        """Returns the bytes of low and high read, and of the bounds written."""
        n, width = self.batch * sum(self.n_blocks), jnp.dtype(self.dtype).itemsize * self.head_dim
        return n * (2 * width + 4 * (1 + self.lower))

    def limit(self) -> float:
        """Returns the tolerance of float32 sums over D: products of the inputs are exact or nearly so."""
        return tolerance.limit("float32", self.head_dim)


_TIMED = {"full": True, "lower": False, "uses": ("bench", "tune")}

SPECS = (
    *(ScoresSpec(2, 4, 64, (48, 48), t) for t in ("float32", "float16")),
    ScoresSpec(1, 8, 128, (200, 16)),
    ScoresSpec(2, 1, 80, (33,) * 4, "float32"),  # MHA
    ScoresSpec(1, 32, 128, (70,), lower=False),  # MQA
    ScoresSpec(3, 3, 256, (1, 40, 7, 1500), "float32"),  # ragged: a tile holds three heads
    ScoresSpec(1, 4, 64, (64, 64), "bfloat16", "float32"),
    *(ScoresSpec(b, 4, 128, (n,) * 8, **_TIMED) for b, n in ((8, 8192), (1, 8192), (8, 512))),
    ScoresSpec(8, 4, 128, (8192,) * 8, full=True, uses=("bench", "tune")),
)


def _candidates(spec: ScoresSpec) -> list[gpu.Settings]:
    return [gpu.Settings(tile, warps) for tile in (16, 32, 64, 128, 256) for warps in (2, 4, 8)]


OP = Op(bound_scores, SPECS, swaps=(("low", "high"),), candidates=_candidates)
