"""The cases of marks that are tested and timed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mark_topk import mark_topk
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "MarkSpec"]


@dataclass(frozen=True)
class MarkSpec(Spec):
    """Sizes in the alphabet. k: of the largest row. kind: normal scores, or ties of few values."""

    rows: int
    slots: int
    k: int
    kind: str = "normal"
    dtype: str = "float32"
    uses: tuple[str, ...] = ("test",)

    @property
    def platforms(self) -> tuple[str, ...]:
        """A TPU has the reference, of which small cases do."""
        return ("gpu", "tpu") if self.rows * self.slots < 2**16 else ("gpu",)

    @property
    def name(self) -> str:
        """For example 64-s6553-top204-normal-float32."""
        return f"{self.rows}-s{self.slots}-top{self.k}-{self.kind}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes scores, a third of which are -inf, and a k for each row, that of the first being 0."""
        keys = jax.random.split(key, 2)
        scores = jax.random.normal(keys[0], (self.rows, self.slots))
        scores = jnp.round(scores) if self.kind == "ties" else scores
        scores = jnp.where(jax.random.uniform(keys[1], scores.shape) < 1 / 3, -jnp.inf, scores)
        return {"scores": scores.astype(self.dtype), "k": jnp.linspace(0, self.k, self.rows).astype(int)}

    def options(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def bytes(self) -> int:
        """Returns the bytes of the scores and of the marks."""
        return self.rows * self.slots * (jnp.dtype(self.dtype).itemsize + 1)

    def limit(self) -> float:
        """Returns 0: marks are right or wrong."""
        return 0.0


SPECS = (
    MarkSpec(3, 100, 70),  # of the last row all that are not -inf
    MarkSpec(4, 1000, 300, "ties"),
    MarkSpec(2, 33000, 9000, "ties", "bfloat16"),  # more than a block
    MarkSpec(8, 32768, 9600, uses=("bench",)),
    MarkSpec(64, 6553, 204, uses=("bench",)),
    MarkSpec(8, 131072, 38400, uses=("bench",)),
)

OP = Op(mark_topk, SPECS, platforms=("gpu",))
