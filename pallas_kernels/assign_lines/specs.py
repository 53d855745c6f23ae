"""The cases of assigned lines that are tested and timed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.assign_lines import assign_lines
from pallas_kernels.attention import starts
from pallas_kernels.host import Blocks
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "LinesSpec"]

_NOW = 40


@dataclass(frozen=True)
class LinesSpec(Spec):
    """Sizes in the alphabet; lines: C. chosen: N, each block named twice where it has several slots."""

    batch: int
    slots: tuple[int, ...]
    block: int
    lines: int
    chosen: int
    uses: tuple[str, ...] = ("test",)

    @property
    def platforms(self) -> tuple[str, ...]:
        """A TPU has the reference, of which small cases do."""
        return ("gpu", "tpu") if self.chosen < 2**11 else ("gpu",)

    @property
    def name(self) -> str:
        """For example b2-k8-s4096-p1x24of96."""
        sizes = f"b{self.batch}-k{len(self.slots)}-s{max(self.slots)}"
        return f"{sizes}-p{self.block}x{self.chosen}of{self.lines}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes lines of which three quarters hold a block, some read at the same time, and random lists."""
        counts = self.options()["blocks"].counts
        heads = [self._head(n, k) for n, k in zip(counts, jax.random.split(key, len(counts)), strict=True)]
        held, used, idx = (jnp.stack(x, axis=1) for x in zip(*heads, strict=True))
        line = jnp.full((self.batch, sum(counts)), -1, jnp.int32)
        row = jnp.asarray(starts(counts)[:-1])[:, None]
        b, place = jnp.arange(self.batch)[:, None, None], jnp.arange(self.lines)
        at = jnp.where(held >= 0, row + held, sum(counts))
        line = line.at[b, at].set(jnp.broadcast_to(place, held.shape), mode="drop")
        return {"line": line, "held": held, "used": used, "idx": idx, "now": jnp.full(self.batch, _NOW)}

    def _head(self, n_blocks: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the blocks that one head's lines hold, their times, and the list."""
        keys = jax.random.split(key, 5)
        draw = lambda key, n: jnp.argsort(jax.random.uniform(key, (self.batch, n)), axis=1)  # noqa: E731
        held = draw(keys[0], n_blocks)[:, : self.lines]
        held = jnp.pad(held, ((0, 0), (0, self.lines - held.shape[1])), constant_values=-1)
        held = jnp.where(jax.random.uniform(keys[1], held.shape) < 0.75, held, -1).astype(jnp.int32)
        used = jnp.where(held >= 0, jax.random.randint(keys[2], held.shape, _NOW - 8, _NOW), -1)
        twice = 2 if self.block > 1 else 1
        chosen = jnp.sort(draw(keys[3], n_blocks)[:, : self.chosen // twice], axis=1)
        idx = jnp.repeat(chosen, twice, axis=1).astype(jnp.int32)
        idx = jnp.pad(idx, ((0, 0), (0, self.chosen - idx.shape[1])), constant_values=-1)
        n = jax.random.randint(keys[4], (self.batch, 1), self.chosen // 2, self.chosen + 1)
        return held, used, jnp.where(jnp.arange(self.chosen) < n, idx, -1)

    def options(self) -> dict[str, Any]:
        """Returns the capacities and the block."""
        return {"blocks": Blocks(self.slots, self.block)}

    def bytes(self) -> int:
        """Returns the bytes of the times, read once, of the lists, and of what a new block changes."""
        return 4 * self.batch * len(self.slots) * (self.lines + 7 * self.chosen)

    def limit(self) -> float:
        """Returns 0: numbers are whole."""
        return 0.0


SPECS = (
    LinesSpec(2, (96, 96), 1, 24, 12),
    LinesSpec(1, (700, 333, 900), 1, 650, 600),  # several tiles; more lines than a head has blocks
    LinesSpec(1, (17000, 16700), 1, 16500, 300),  # more lines than are looked at together
    LinesSpec(2, (90, 33), 4, 12, 10),
    LinesSpec(1, (256, 128), 16, 9, 8),
    *(LinesSpec(b, (32768,) * 8, 1, 8192, 4096, uses=("bench",)) for b in (8, 39)),
)

OP = Op(assign_lines, SPECS, platforms=("gpu",))
