"""The cases of new tokens that are tested and timed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.append_rows import Turn, append_rows
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "AppendSpec"]


@dataclass(frozen=True)
class AppendSpec(Spec):
    """Sizes in the alphabet; tokens: T. Stores are keys, values, positions and masses.

    group: queries of a KV head that are turned, as are the keys; 0 for no rotation.
    """

    batch: int
    head_dim: int
    slots: tuple[int, ...]
    tokens: int = 1
    dtype: str = "bfloat16"
    group: int = 0
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b2-k8-g4-d128-s4096-t1-bfloat16."""
        group = f"-g{self.group}" if self.group else ""
        sizes = f"b{self.batch}-k{len(self.slots)}{group}-d{self.head_dim}-s{max(self.slots)}"
        return f"{sizes}-t{self.tokens}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs: heads that are empty or fill up, and tokens that are padding."""
        keys = jax.random.split(key, 8)
        heads, n_rows = (self.batch, len(self.slots)), sum(self.slots)

        def both(keys: jax.Array, shape: tuple[int, ...]) -> tuple:
            k, v = (jax.random.normal(key, (*shape, self.head_dim)).astype(self.dtype) for key in keys[:2])
            return k, v, jax.random.randint(keys[2], shape, 0, 1000), jax.random.uniform(keys[2], shape)

        valid = jax.random.uniform(keys[6], (self.batch, self.tokens)) > 0.3
        return {
            "stores": both(keys[:3], (self.batch, n_rows)),
            "rows": both(keys[3:6], (*heads, self.tokens)),
            "fill": jax.random.randint(keys[7], heads, 0, jnp.asarray(self.slots) + 1),
            "seen": jax.random.randint(keys[7], (self.batch,), 0, 1000),
            "order": jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, -1),
        } | ({"turn": self._turn(keys[0])} if self.group else {})

    def _turn(self, key: jax.Array) -> Turn:
        """Makes angles, and queries and one more vector, to be turned by them."""
        keys = jax.random.split(key, 3)
        shape = (self.batch, self.tokens, len(self.slots))
        angle = 10 * jax.random.normal(keys[0], (*shape[:2], self.head_dim // 2))
        vectors = [
            jax.random.normal(k, (*shape, n, self.head_dim)).astype(self.dtype)
            for k, n in zip(keys[1:], (self.group, 1), strict=True)
        ]
        return Turn(jnp.cos(angle), jnp.sin(angle), vectors, (True, False, False, False))

    def options(self) -> dict[str, Any]:
        """Returns the capacities."""
        return {"slots": self.slots}

    def bytes(self) -> int:
        """Returns the bytes of the new rows, read and written."""
        vectors = 3 + self.group if self.group else 2
        row = vectors * self.head_dim * jnp.dtype(self.dtype).itemsize + 8
        return 2 * self.batch * len(self.slots) * self.tokens * row

    def limit(self) -> float:
        """Returns 0: rows are copied."""
        return 0.0


SPECS = (
    AppendSpec(2, 64, (96, 96)),
    AppendSpec(3, 80, (9, 33, 1), 1, "float32", 3),
    AppendSpec(2, 64, (64, 40), 20, "bfloat16", 2),
    AppendSpec(1, 128, (200, 64, 40), 50, "float16"),  # more tokens than the last head holds
)

OP = Op(append_rows, SPECS, platforms=("gpu",))
