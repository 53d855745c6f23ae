"""The cases of the union of top-k that are tested, timed and tuned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.op import Op, Spec
from pallas_kernels.select_topk.specs import DATA
from pallas_kernels.union_topk import union_topk

__all__ = ["OP", "UnionSpec"]


@dataclass(frozen=True)
class UnionSpec(Spec):
    """Sizes in the alphabet; room: the union's limit. data: one of `select_topk.specs.DATA`."""

    batch: int
    heads: int
    group: int
    slots: int
    k: int
    room: int | None = None
    dtype: str = "float32"
    data: str = "normal"
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b2-k8-g4-s4096-top64-normal-float32."""
        room = "" if self.room is None else f"in{self.room}"
        shape = f"b{self.batch}-k{self.heads}-g{self.group}-s{self.slots}"
        return f"{shape}-top{self.k}{room}-{self.data}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes scores."""
        shape = (self.batch, self.heads, self.group, self.slots)
        return {"scores": DATA[self.data](key, shape).astype(self.dtype)}

    def options(self) -> dict[str, Any]:
        """Returns k and limit."""
        return {"k": self.k, "limit": self.room}

    def bytes(self) -> int:
        """Returns the bytes of the scores, read once, and of the indices."""
        limit = min(self.group * self.k, self.slots) if self.room is None else self.room
        n_heads = self.batch * self.heads
        return n_heads * (self.group * self.slots * jnp.dtype(self.dtype).itemsize + 4 * limit)

    def limit(self) -> float:
        """Indices are the reference's."""
        return 0.0


_TIMED = ("bench", "tune")

SPECS = (
    UnionSpec(2, 2, 1, 3000, 100, dtype="bfloat16"),
    UnionSpec(1, 2, 3, 2500, 90, 110),
    UnionSpec(2, 1, 2, 9000, 300, 400, data="ties"),
    UnionSpec(1, 1, 4, 10000, 700, data="sparse"),
    UnionSpec(8, 8, 4, 32768, 983, uses=_TIMED),
    UnionSpec(8, 8, 4, 32768, 983, 2048, uses=_TIMED),
    UnionSpec(1, 8, 4, 131072, 2048, uses=_TIMED),
)

OP = Op(union_topk, SPECS)
