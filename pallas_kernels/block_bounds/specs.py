"""The cases of block bounds that are tested, timed and tuned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_bounds import block_bounds, gpu
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "BoundsSpec"]


@dataclass(frozen=True)
class BoundsSpec(Spec):
    """Sizes in the alphabet. full: no empty slots."""

    batch: int
    head_dim: int
    slots: tuple[int, ...]
    block: int
    dtype: str = "bfloat16"
    full: bool = False
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b2-k8-d128-s4096-p16-bfloat16."""
        most, mean = max(self.slots), sum(self.slots) // len(self.slots)
        s = f"s{most}" if most == mean else f"s{most}of{mean}"
        return f"b{self.batch}-k{len(self.slots)}-d{self.head_dim}-{s}-p{self.block}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs. Unless full, a fifth of the slots is empty, and each row's last half head."""
        key, other = jax.random.split(key)
        k = jax.random.normal(key, (self.batch, sum(self.slots), self.head_dim), self.dtype)
        mass = jnp.ones(k.shape[:2])
        if not self.full:
            mass = mass.at[:, k.shape[1] - self.slots[-1] // 2 :].set(0.0)
            mass = jnp.where(jax.random.uniform(other, mass.shape) < 0.2, 0.0, mass)
            k = jnp.where((mass > 0)[..., None], k, jnp.nan)
        return {"k": k, "mass": mass}

    def options(self) -> dict[str, Any]:
        """Returns the capacities and the block."""
        return {"slots": self.slots, "block": self.block}

    def bytes(self) -> int:
        """Returns the bytes of keys and masses, and of two bounds per block."""
        n_blocks = sum(-(-s // self.block) for s in self.slots)
        width = jnp.dtype(self.dtype).itemsize * self.head_dim
        return self.batch * (sum(self.slots) * (width + 4) + 2 * n_blocks * width)

    def limit(self) -> float:
        """Returns 0: a bound is one of the keys."""
        return 0.0


_TIMED = {"full": True, "uses": ("bench", "tune")}

SPECS = (
    *(BoundsSpec(2, 64, (128, 128), 16, t) for t in ("float32", "float16")),
    BoundsSpec(1, 128, (1024, 32), 32),
    BoundsSpec(2, 80, (96,), 8),
    BoundsSpec(1, 256, (64,), 64, "float32"),  # a head is one block
    BoundsSpec(3, 64, (7, 320, 40, 1), 16, "float32"),  # ragged, and no multiple of anything
    BoundsSpec(1, 128, (100, 100), 12),
    BoundsSpec(1, 32, (2500,), 1024, "float32"),
    *(BoundsSpec(b, 128, (s,) * 8, 16, **_TIMED) for b, s in ((8, 131072), (1, 131072), (8, 8192))),
    BoundsSpec(8, 128, (131072,) * 8, 64, **_TIMED),
)


def _candidates(spec: BoundsSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(tile, unroll, warps)
        for tile in (8, 16, 32, 64)
        for unroll in (4, 8, 16)
        for warps in (2, 4, 8)
    ]


OP = Op(block_bounds, SPECS, candidates=_candidates)
