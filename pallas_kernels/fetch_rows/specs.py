"""The cases of row copies that are tested and timed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.attention import quantize, starts
from pallas_kernels.fetch_rows import fetch_rows
from pallas_kernels.host import Blocks, as_pages, pairs
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "FetchSpec"]


@dataclass(frozen=True)
class FetchSpec(Spec):
    """Sizes in the alphabet; lines: of each head. chosen: N, of which a fifth is none unless full.

    host: far lies in pinned host memory. paged: as `Pages`. listed: places before the first -1, None for all.
    """

    batch: int
    head_dim: int
    slots: tuple[int, ...]
    block: int
    lines: int
    chosen: int
    staged: int
    dtype: str = "bfloat16"
    bits: int = 16
    full: bool = False
    host: bool = False
    paged: bool = False
    listed: int | None = None
    uses: tuple[str, ...] = ("test",)

    @property
    def platforms(self) -> tuple[str, ...]:
        """A TPU has pages, and a GPU all else."""
        return ("tpu",) if self.paged else ("gpu",)

    @property
    def name(self) -> str:
        """For example b2-k8-d128-s4096-p1x24of96-bfloat16."""
        kind = self.dtype if self.bits == 16 else f"int{self.bits}-{self.dtype}"
        kind += "-paged" if self.paged else ""
        sizes = f"b{self.batch}-k{len(self.slots)}-d{self.head_dim}-s{max(self.slots)}"
        some = "" if self.listed is None else f"{self.listed}in"
        return f"{sizes}-p{self.block}x{some}{self.chosen}of{self.lines}-{kind}{'-host' if self.host else ''}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs. Rows of no chosen block, and those that are staged instead, are NaN."""
        keys = jax.random.split(key, 4)
        n_heads, both = len(self.slots), tuple(2 * s for s in self.slots)
        draw = lambda key, *shape: jax.random.normal(key, (self.batch, *shape, self.head_dim), self.dtype)  # noqa: E731
        near = tuple(draw(k, n_heads * self.lines * self.block) for k in jax.random.split(keys[0]))
        far = draw(keys[1], sum(both))
        staged = tuple(draw(k, n_heads, self.staged) for k in jax.random.split(keys[2]))
        idx, line, read = self._lists(keys[3])
        first = jnp.asarray([s - self.staged for s in self.slots], jnp.int32)
        old = [jnp.arange(s) < f for s, f in zip(self.slots, first, strict=True)]
        if self.bits < 16:
            far = pairs(quantize(far, self.bits, both, None))
        elif not self.full:
            far = jnp.where(jnp.repeat(read & jnp.concatenate(old), 2, axis=1)[..., None], far, jnp.nan)
        if self.paged:
            far = as_pages(far, Blocks(both, 2 * self.block))
        if self.host:
            far = jax.device_put(far, jax.memory.Space.Host)
        first = jnp.broadcast_to(first, (self.batch, n_heads))
        return {"near": near, "far": far, "staged": staged, "idx": idx, "line": line, "first": first}

    def _lists(self, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns distinct random blocks, distinct random lines, and which packed rows are read."""
        idx, line = [], []
        read = jnp.zeros((self.batch, sum(self.slots)), bool)
        b = jnp.arange(self.batch)[:, None, None]
        for first, size, k in zip(
            starts(self.slots), self.slots, jax.random.split(key, len(self.slots)), strict=False
        ):
            draw = [jax.random.uniform(x, (self.batch, self.lines)) for x in jax.random.split(k)]
            order = jax.random.uniform(k, (self.batch, -(-size // self.block)))
            at, to = (jnp.argsort(x, axis=1)[:, : self.chosen].astype(jnp.int32) for x in (order, draw[0]))
            at = jnp.pad(at, ((0, 0), (0, self.chosen - at.shape[1])), constant_values=-1)
            at = at if self.listed is None else jnp.where(jnp.arange(self.chosen) < self.listed, at, -1)
            to = to if self.full else jnp.where(draw[1][:, : self.chosen] < 0.2, -1, to)
            slot = at[..., None] * self.block + jnp.arange(self.block)
            named = ((at >= 0) & (to >= 0))[..., None] & (slot < size)
            read = read.at[b, jnp.where(named, first + slot, read.shape[1])].set(True, mode="drop")
            idx.append(at)
            line.append(to)
        return jnp.stack(idx, axis=1), jnp.stack(line, axis=1), read

    def options(self) -> dict[str, Any]:
        """Returns the capacities and the block."""
        return {"blocks": Blocks(self.slots, self.block)}

    def bytes(self) -> int:
        """Returns the bytes of the chosen rows, read and written, and of the lists."""
        size = jnp.dtype(self.dtype).itemsize
        row = self.head_dim * (size + (size if self.bits == 16 else 1)) + (self.bits < 16) * 2 * size
        copied = self.chosen if self.listed is None else self.listed
        return self.batch * len(self.slots) * copied * (2 * self.block * row + 8)

    def limit(self) -> float:
        """Returns the tolerance of one product, for codes; copies are exact."""
        return tolerance.limit(self.dtype, 1) if self.bits < 16 else 0.0


_TIMED = {"full": True, "uses": ("bench",)}

SPECS = (
    FetchSpec(2, 128, (96, 96), 1, 24, 12, 8, "float32"),
    FetchSpec(1, 128, (200, 64, 40), 16, 5, 3, 20, "bfloat16"),  # a last block cut short
    FetchSpec(1, 80, (130, 40), 1, 70, 60, 5, "float32"),  # powers of two nowhere
    FetchSpec(2, 64, (90, 33), 4, 12, 7, 6, "float16"),
    FetchSpec(1, 128, (256, 128), 32, 6, 4, 40, "bfloat16"),
    FetchSpec(1, 128, (96, 70), 1, 40, 30, 9, "bfloat16", bits=8),
    FetchSpec(1, 64, (96, 70), 8, 9, 6, 9, "float32", bits=8),
    FetchSpec(2, 128, (192, 80), 32, 5, 3, 40, paged=True),  # a last block cut short
    FetchSpec(1, 128, (96, 70), 16, 4, 4, 20, "float32", paged=True),
    FetchSpec(1, 64, (512,), 128, 3, 2, 30, "float16", paged=True),
    *(FetchSpec(8, 128, (32768,) * 8, p, 1024 // p, 1024 // p, 64, host=True, **_TIMED) for p in (1, 16, 64)),
    FetchSpec(8, 128, (32768,) * 8, 1, 1024, 1024, 64, bits=8, host=True, **_TIMED),
    FetchSpec(39, 128, (32768,) * 8, 1, 4096, 2048, 64, bits=8, listed=48, host=True, **_TIMED),
    FetchSpec(8, 128, (32768,) * 8, 32, 64, 64, 64, paged=True, host=True, **_TIMED),
    FetchSpec(8, 128, (32768,) * 8, 128, 16, 16, 64, paged=True, host=True, **_TIMED),
)

OP = Op(fetch_rows, SPECS)
