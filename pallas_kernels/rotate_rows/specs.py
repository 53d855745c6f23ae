"""The cases of rotations that are tested and timed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tolerance
from pallas_kernels.op import Op, Spec
from pallas_kernels.rotate_rows import rotate_rows

__all__ = ["OP", "RotateSpec"]


@dataclass(frozen=True)
class RotateSpec(Spec):
    """Sizes in the alphabet."""

    batch: int
    rows: int
    head_dim: int
    dtype: str = "bfloat16"
    back: bool = False
    uses: tuple[str, ...] = ("test",)

    @property
    def platforms(self) -> tuple[str, ...]:
        """A TPU has the reference, of which small cases do."""
        return ("gpu", "tpu") if "test" in self.uses else ("gpu",)

    @property
    def name(self) -> str:
        """For example b1-r262144-d128-bfloat16-back."""
        return f"b{self.batch}-r{self.rows}-d{self.head_dim}-{self.dtype}{'-back' if self.back else ''}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes rows at positions of a long text."""
        keys, shape = jax.random.split(key, 2), (self.batch, self.rows)
        inv = 5e5 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        return {
            "x": jax.random.normal(keys[0], (*shape, self.head_dim)).astype(self.dtype),
            "pos": jax.random.randint(keys[1], shape, 0, 131072),
            "frequencies": jnp.asarray(inv, jnp.float32),
        }

    def options(self) -> dict[str, Any]:
        """Returns an unusual factor, and the direction."""
        return {"factor": 1.25, "back": self.back}

    def bytes(self) -> int:
        """Returns the bytes of the rows, read and written, and of positions."""
        return self.batch * self.rows * (2 * self.head_dim * jnp.dtype(self.dtype).itemsize + 4)

    def limit(self) -> float:
        """Returns the error of a rotation."""
        return tolerance.limit(self.dtype, 2)


SPECS = (
    RotateSpec(2, 37, 64, "float32"),
    RotateSpec(1, 100, 128, back=True),
    RotateSpec(1, 33, 80, "float16"),
    RotateSpec(1, 8 * 32768, 128, back=True, uses=("bench",)),
    RotateSpec(8, 8 * 6553, 128, back=True, uses=("bench",)),
)

OP = Op(rotate_rows, SPECS, platforms=("gpu",))
