"""The cases of new rows in stores of codes that are tested and timed."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import decode_codes, quantize, starts
from pallas_kernels.op import Op, Spec
from pallas_kernels.write_codes import Ring, write_codes

__all__ = ["OP"]


@dataclass(frozen=True)
class WriteSpec(Spec):
    """Sizes in the alphabet; window: W of the ring. A store has scales per block, another per row."""

    batch: int
    head_dim: int
    slots: tuple[int, ...]
    bits: int
    block: int = 32
    window: int = 32
    dtype: str = "bfloat16"
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b1-k8-d128-s4096-p32-w32-int8-bfloat16."""
        sizes = f"b{self.batch}-k{len(self.slots)}-d{self.head_dim}-s{max(self.slots)}"
        return f"{sizes}-p{self.block}-w{self.window}-int{self.bits}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs: rings with rows of the block and others, slots without mass, a head that is full."""
        keys = jax.random.split(key, 8)
        heads, n_rows = (self.batch, len(self.slots)), sum(self.slots)
        first = jnp.asarray(starts(self.slots)[:-1])
        at = jax.random.randint(keys[0], heads, 0, jnp.asarray(self.slots))  # slot that is written
        back = jnp.arange(1, self.window + 1)
        slot = jnp.where(at[..., None] >= back, at[..., None] - back + first[:, None], n_rows)
        slot = slot.at[..., 0].set(jnp.where(at % 2 == 0, first + at, n_rows))  # of some, what is overwritten
        order = jax.random.permutation(keys[1], self.window)
        stores, rings, rows = [], [], []
        for i, block in enumerate((self.block, None)):
            own = jax.random.split(keys[2 + i], 3)
            x = jax.random.normal(own[0], (self.batch, n_rows, self.head_dim)).astype(self.dtype)
            stores.append(quantize(x, self.bits, self.slots, block))
            exact = jax.random.normal(own[1], (*heads, self.window, self.head_dim)).astype(self.dtype)
            turn = jnp.broadcast_to(jnp.argmax(order == 1).astype(jnp.int32), heads)
            rings.append(Ring(exact, slot[..., order].astype(jnp.int32), turn))
            rows.append(jax.random.normal(own[2], (*heads, self.head_dim)).astype(self.dtype))
        idx = jnp.where(jax.random.uniform(keys[6], heads) > 0.1, at + first, n_rows)
        mass = (jax.random.uniform(keys[7], (self.batch, n_rows)) > 0.1).astype(jnp.float32)
        mass = mass.at[jnp.arange(self.batch)[:, None], idx].set(1.0, mode="drop")
        return {"stores": stores, "rings": rings, "rows": rows, "idx": idx.astype(jnp.int32), "mass": mass}

    def options(self) -> dict[str, Any]:
        """Returns the capacities."""
        return {"slots": self.slots}

    def bytes(self) -> int:
        """Returns the bytes of a block and of a row, of their rings' slots, and of the new rows."""
        size = jnp.dtype(self.dtype).itemsize
        block = self.block * (self.head_dim * (2 * self.bits // 8 + size) + 4) + 4 * self.head_dim * size
        row = self.head_dim * self.bits // 8 + 2 * size
        ring = 2 * (4 * self.window + 2 * self.head_dim * size)
        return self.batch * len(self.slots) * (block + row + 2 * ring)

    def limit(self) -> float:
        """Returns two steps of a code: it, and a scale that is divided, may be rounded the other way."""
        return 2.1


def _error(out: Any, expected: Any, given: dict[str, Any]) -> float:
    """Returns the largest error of values, in steps of their codes; rings are to be exact."""
    (stores, rings), (wanted, exact) = out, expected
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), rings, exact)
    worst = 0.0 if all(jax.tree.leaves(same)) else np.inf
    for a, b in zip(stores, wanted, strict=True):
        one = jnp.full_like(b.codes, 1 if b.bits == 8 else 0x11)
        found = (a, b, dataclasses.replace(b, codes=one, zero=jnp.zeros_like(b.zero)))
        values, right, step = (
            np.asarray(decode_codes(jax.tree.map(jnp.asarray, x), given["slots"]), np.float64) for x in found
        )
        worst = max(worst, float((np.abs(values - right) / step).max()))
    return worst


SPECS = (
    WriteSpec(2, 64, (96, 80), 8),
    WriteSpec(2, 64, (96, 80), 4),
    WriteSpec(3, 80, (9, 70, 33), 8, 8, 20, "float32"),  # blocks that a head's last slot cuts
    WriteSpec(1, 16, (40, 64), 4, 16, 33, "float16"),
)

OP = Op(write_codes, SPECS, error=_error, platforms=("gpu",))
