"""The cases of rms_norm that are tested and timed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.op import Op, Spec
from pallas_kernels.rms_norm import rms_norm

__all__ = ["OP", "NormSpec"]


@dataclass(frozen=True)
class NormSpec(Spec):
    """Sizes in the alphabet."""

    batch: int
    width: int  # M
    dtype: str = "bfloat16"
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b1-m4096-bfloat16."""
        return f"b{self.batch}-m{self.width}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs."""
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (self.batch, self.width), self.dtype)
        return {"x": x, "scale": jax.random.uniform(keys[1], (self.width,), minval=0.5, maxval=2.0)}

    def options(self) -> dict[str, Any]:
        """Returns what is added to the mean square."""
        return {"eps": 1e-5}

    def bytes(self) -> int:
        """Returns the bytes of the rows, read and written, and of the scales."""
        return 2 * self.batch * self.width * jnp.dtype(self.dtype).itemsize + 4 * self.width

    def limit(self) -> float:
        """Returns the tolerance of a mean over the channels."""
        return tolerance.limit(self.dtype, self.width)


SPECS = (
    NormSpec(1, 4096),
    NormSpec(1, 1536, "float32"),
    NormSpec(3, 640, "float16"),
    NormSpec(2, 100, "float32"),
)

OP = Op(rms_norm, SPECS, platforms=("gpu",))
