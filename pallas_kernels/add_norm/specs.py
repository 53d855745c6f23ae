"""The cases of add_norm that are tested and timed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.add_norm import add_norm
from pallas_kernels.op import Op, Spec

__all__ = ["OP"]


@dataclass(frozen=True)
class NormSpec(Spec):
    """Sizes in the alphabet."""

    batch: int
    width: int  # M
    dtype: str
    uses: tuple[str, ...] = ("test",)
    platforms: tuple[str, ...] = ("gpu",)

    @property
    def name(self) -> str:
        """For example b8-m4096-bfloat16."""
        return f"b{self.batch}-m{self.width}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes random inputs."""
        keys = jax.random.split(key, 3)
        x, y = (3 * jax.random.normal(k, (self.batch, self.width), self.dtype) for k in keys[:2])
        return {"x": x, "y": y, "scale": 1 + jax.random.normal(keys[2], (self.width,)) / 4}

    def options(self) -> dict[str, Any]:
        """Returns the smallest square."""
        return {"eps": 1e-5}

    def bytes(self) -> int:
        """Returns the bytes of two rows read and two written, and of the scale."""
        return self.width * (4 * self.batch * jnp.dtype(self.dtype).itemsize + 4)

    def limit(self) -> float:
        """Returns the tolerance of a mean over the width."""
        return tolerance.limit(self.dtype, self.width)


SPECS = (
    NormSpec(1, 576, "float32"),
    NormSpec(3, 100, "bfloat16"),
    NormSpec(2, 1536, "float16"),
    NormSpec(8, 5120, "bfloat16"),
    *(NormSpec(b, 4096, "bfloat16", ("bench",)) for b in (1, 8)),
)

OP = Op(add_norm, SPECS, platforms=("gpu",))
