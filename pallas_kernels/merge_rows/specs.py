"""The cases of merges that are tested, timed and tuned."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tolerance
from pallas_kernels.merge_rows import MergeForm, gpu, merge_rows
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "MergeSpec"]


@dataclass(frozen=True)
class MergeSpec(Spec):
    """Sizes in the alphabet; merges: M. turned: keys and values with positions, else keys alone."""

    batch: int
    head_dim: int
    rows: int
    merges: int
    left: int  # Q
    dtype: str = "bfloat16"
    turned: bool = True
    reach: int | None = None
    uses: tuple[str, ...] = ("test",)

    @property
    def platforms(self) -> tuple[str, ...]:
        """A TPU has the reference, of which small cases do."""
        return ("gpu", "tpu") if "test" in self.uses else ("gpu",)

    @property
    def name(self) -> str:
        """For example b1-d128-r4096-m1000-q3096-bfloat16-turned."""
        sizes = f"b{self.batch}-d{self.head_dim}-r{self.rows}-m{self.merges}-q{self.left}"
        return f"{sizes}-{self.dtype}{'-turned' if self.turned else ''}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs: a tenth of the sources are lost, and rows that nobody is to read are NaN."""
        keys, n_rows, m = jax.random.split(key, 6), self.rows, self.merges
        shape = (self.batch, n_rows)
        each = jax.vmap(jax.random.permutation, (0, None))(jax.random.split(keys[0], self.batch), n_rows)
        rest = jnp.sort(each[:, m:])
        old = jnp.pad(rest, ((0, 0), (0, self.left)), constant_values=-1)[:, : self.left]
        # Where a source goes: to a row near it that stays, if it goes.
        near = jax.vmap(jnp.searchsorted)(rest, each[:, :m]) + jax.random.randint(keys[1], (m,), -3, 4)
        border = (rest < n_rows // 2).sum(1, keepdims=True)  # of the two heads
        near = jnp.where(each[:, :m] < n_rows // 2, jnp.minimum(near, border - 1), jnp.maximum(near, border))
        goes = jax.random.uniform(keys[2], (self.batch, m)) < 0.9
        to = jnp.take_along_axis(rest, jnp.clip(near, 0, rest.shape[1] - 1), axis=1)
        row = jnp.arange(self.batch)[:, None]
        into = jnp.full(shape, n_rows).at[row, each[:, :m]].set(jnp.where(goes, to, n_rows))
        read = (into < n_rows).at[row, jnp.where(old < 0, n_rows, old)].set(True, mode="drop")

        def draw(key: jax.Array) -> jax.Array:
            x = jax.random.normal(key, (*shape, self.head_dim))
            return jnp.where(read[..., None], x, jnp.nan).astype(self.dtype)

        n = jax.random.randint(keys[5], shape, 1, 9).astype(jnp.float32)
        found = {"rows": (draw(keys[3]), draw(keys[4]))[: 1 + self.turned], "n": n, "old": old, "into": into}
        if self.turned:
            inv = 5e5 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
            found["pos"] = jnp.broadcast_to(jnp.arange(n_rows, dtype=jnp.int32) * 7 % 5000, shape)
            found["frequencies"] = jnp.asarray(inv, jnp.float32)
        return found

    def options(self) -> dict[str, Any]:
        """Returns how many merge and from where, and the factor of a rotation, an unusual one."""
        head, factor = self.rows // 2, 1.25 if self.turned else 1.0
        return {"form": MergeForm((head, self.rows - head), self.merges, self.reach, factor)}

    def bytes(self) -> int:
        """Returns the bytes of the rows that are read and written."""
        row = (1 + self.turned) * self.head_dim * jnp.dtype(self.dtype).itemsize
        return self.batch * (2 * self.left + self.merges) * row

    def limit(self) -> float:
        """Returns the error of a sum in another order, and of an angle's cosine."""
        return tolerance.limit(self.dtype, 64)


SPECS = (
    MergeSpec(2, 64, 90, 40, 60, "float32"),
    MergeSpec(1, 128, 300, 130, 150),  # fewer rows than are left
    MergeSpec(2, 80, 130, 64, 66, "float16", turned=False, reach=130),
    MergeSpec(2, 128, 400, 30, 390, reach=300),  # few merge
    MergeSpec(1, 64, 601, 400, 250, "float32", turned=False),  # heads of two sizes
    MergeSpec(1, 128, 8 * 32768, 8 * 9600, 8 * 23168, turned=False, reach=256, uses=("bench", "tune")),
    MergeSpec(1, 128, 8 * 32768, 8 * 26200, 8 * 6553, uses=("bench", "tune")),
    MergeSpec(8, 128, 8 * 6553, 8 * 204, 8 * 6553, reach=256, uses=("bench", "tune")),
)


def _candidates(spec: MergeSpec) -> list[gpu.Settings]:
    return [gpu.Settings(tile, warps) for tile in (4, 8, 16, 32) for warps in (1, 2, 4, 8)]


def _error(out: Any, expected: Any, arrays: dict[str, Any]) -> float:
    """Compares rows; n and positions are to be equal."""
    both = zip(jax.tree.leaves(out[1:]), jax.tree.leaves(expected[1:]), strict=True)
    exact = all(np.array_equal(a, b) for a, b in both)
    return tolerance.error(out[0], expected[0]) if exact else math.inf


OP = Op(merge_rows, SPECS, error=_error, candidates=_candidates, platforms=("gpu",))
