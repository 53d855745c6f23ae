"""The cases of row writes that are tested and timed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.host import Blocks, as_pages
from pallas_kernels.op import Op, Spec
from pallas_kernels.stow_rows import stow_rows

__all__ = ["OP", "StowSpec"]


@dataclass(frozen=True)
class StowSpec(Spec):
    """Sizes in the alphabet; staged: W. block: P of `Pages` in pinned host memory, None for rows."""

    batch: int
    head_dim: int
    slots: tuple[int, ...]
    staged: int
    dtype: str = "bfloat16"
    block: int | None = None
    uses: tuple[str, ...] = ("test",)

    @property
    def platforms(self) -> tuple[str, ...]:
        """A TPU has pages, and a GPU rows."""
        return ("tpu",) if self.block else ("gpu",)

    @property
    def name(self) -> str:
        """For example b2-k8-d128-s4096-w64-bfloat16."""
        sizes = f"b{self.batch}-k{len(self.slots)}-d{self.head_dim}-s{max(self.slots)}"
        return f"{sizes}-w{self.staged}-{self.dtype}{f'-p{self.block}' if self.block else ''}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs: heads that are empty or fill up, and some that take no rows."""
        keys = jax.random.split(key, 4)
        heads = (self.batch, len(self.slots))
        draw = lambda key, shape: (64 * jax.random.normal(key, shape)).astype(self.dtype)  # noqa: E731
        far = draw(keys[0], (self.batch, sum(self.slots), self.head_dim))
        if self.block:
            far = as_pages(far, Blocks(self.slots, self.block))
            far = jax.device_put(far, jax.memory.Space.Host)
        staged = draw(keys[1], (*heads, self.staged, self.head_dim))
        first = jnp.floor(jax.random.uniform(keys[2], heads) * jnp.asarray(self.slots)).astype(jnp.int32)
        n = jax.random.randint(keys[3], heads, 0, self.staged + 1)
        return {"far": far, "staged": staged, "first": first, "end": first + n}

    def options(self) -> dict[str, Any]:
        """Returns the capacities."""
        return {"slots": self.slots}

    def bytes(self) -> int:
        """Returns the bytes of the staged rows, read and written."""
        heads = self.batch * len(self.slots)
        return 2 * heads * self.staged * self.head_dim * jnp.dtype(self.dtype).itemsize

    def limit(self) -> float:
        """Returns 0: rows are copied."""
        return 0.0


SPECS = (
    StowSpec(2, 64, (96, 96), 8, "float32"),
    StowSpec(1, 128, (200, 64, 40), 50),  # more rows than the last head holds
    StowSpec(2, 80, (33, 130), 33, "float16"),  # powers of two nowhere
    StowSpec(1, 128, (96, 70), 20, "uint8"),
    StowSpec(2, 128, (192, 80), 64, block=32),
    StowSpec(1, 128, (256, 130), 90, "float32", block=32),
)

OP = Op(stow_rows, SPECS, platforms=("gpu",))
