"""The cases of sparse decode attention that are tested, timed and tuned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.attention import AttentionForm, quantize
from pallas_kernels.op import Op, Spec
from pallas_kernels.sparse_decode_attention import gpu, sparse_decode_attention

__all__ = ["OP", "SparseSpec"]


@dataclass(frozen=True)
class SparseSpec(Spec):
    """Sizes in the alphabet; chosen: N. full: mass 1 everywhere and no index of none.

    host: k and v lie in pinned host memory (a compilation for a described GPU ignores it).
    """

    batch: int
    group: int
    head_dim: int
    slots: tuple[int, ...]
    block: int
    chosen: int
    dtype: str = "bfloat16"
    bits: int = 16
    softcap: float | None = None
    full: bool = False
    host: bool = False
    uses: tuple[str, ...] = ("test",)

    @property
    def platforms(self) -> tuple[str, ...]:
        """Only a GPU reads rows in host memory."""
        return ("gpu",) if self.host else ("gpu", "tpu")

    @property
    def name(self) -> str:
        """For example b2-k8-g4-d128-s4096-p16x24-bfloat16."""
        most, mean = max(self.slots), sum(self.slots) // len(self.slots)
        s = f"s{most}" if most == mean else f"s{most}of{mean}"
        kind = self.dtype if self.bits == 16 else f"int{self.bits}-{self.dtype}"
        cap = "" if self.softcap is None else "-softcap"
        sizes = f"b{self.batch}-k{len(self.slots)}-g{self.group}-d{self.head_dim}-{s}"
        return f"{sizes}-p{self.block}x{self.chosen}-{kind}{cap}{'-host' if self.host else ''}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs. Rows of no chosen block are NaN, and unless full, a fifth of the slots is empty."""
        keys = jax.random.split(key, 6)
        rows, n_heads = sum(self.slots), len(self.slots)
        q = jax.random.normal(keys[0], (self.batch, n_heads, self.group, self.head_dim), self.dtype)
        k, v = (jax.random.normal(x, (self.batch, rows, self.head_dim), self.dtype) for x in keys[1:3])
        mass = jnp.ones((self.batch, rows))
        if not self.full:
            mass = jnp.floor(jnp.exp(jax.random.uniform(keys[3], mass.shape, maxval=3.0)))
            mass = jnp.where(jax.random.uniform(keys[4], mass.shape) < 0.2, 0.0, mass)
        idx, read = self._choose(keys[5])
        if self.bits < 16:
            k, v = quantize(k, self.bits, self.slots, 32), quantize(v, self.bits, self.slots, None)
        elif not self.full:
            k, v = (jnp.where((read & (mass > 0))[..., None], x, jnp.nan) for x in (k, v))
        if self.host:
            k, v = jax.device_put((k, v), jax.memory.Space.Host)
        return {"q": q, "k": k, "v": v, "mass": mass, "idx": idx}

    def _choose(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns distinct random blocks [B K N], -1 after them or among them, and which rows they hold."""
        idx, read = [], []
        for size, head_key in zip(self.slots, jax.random.split(key, len(self.slots)), strict=True):
            n = -(-size // self.block)
            score = jax.random.uniform(head_key, (self.batch, n))
            at = jnp.argsort(score, axis=1)[:, : self.chosen].astype(jnp.int32)
            if not self.full:
                at = jnp.where((at % 5 == 2) & (n > 4), -1, at)
            hits = (at[..., None] == jnp.arange(n)).any(1) if not self.full else jnp.ones_like(score, bool)
            read.append(jnp.repeat(hits, self.block, axis=1)[:, :size])
            idx.append(jnp.pad(at, ((0, 0), (0, self.chosen - at.shape[1])), constant_values=-1))
        return jnp.stack(idx, axis=1), jnp.concatenate(read, axis=1)

    def options(self) -> dict[str, Any]:
        """Returns the form and the block."""
        form = AttentionForm(self.slots, softcap=self.softcap, lse="test" in self.uses)
        return {"form": form, "block": self.block}

    def bytes(self) -> int:
        """Returns the bytes of the chosen rows of K and V, their scales and masses, and the indices."""
        size = jnp.dtype(self.dtype).itemsize
        row = 2 * self.head_dim * self.bits // 8 if self.bits < 16 else 2 * self.head_dim * size
        scales = 0
        if self.bits < 16:  # keys: per channel and 32 slots; values: per row
            scales = 2 * size * (-(-self.block // 32) * self.head_dim + self.block)
        return self.batch * len(self.slots) * self.chosen * (self.block * (row + 4) + scales + 4)

    def limit(self) -> float:
        """Returns the tolerance of sums over all chosen slots."""
        return tolerance.limit(self.dtype, self.chosen * self.block)


_TIMED = {"full": True, "uses": ("bench", "tune")}
_LONG = (32768,) * 8

SPECS = (
    SparseSpec(2, 4, 128, (96, 96), 16, 3, "float32"),
    SparseSpec(1, 4, 128, (200, 64, 16), 16, 5, "bfloat16"),  # a last block cut short; a head of one block
    SparseSpec(1, 8, 256, (512, 256), 128, 3, "bfloat16"),
    SparseSpec(1, 3, 80, (160, 40), 8, 9, "float32"),
    SparseSpec(2, 1, 64, (64, 7), 1, 20, "float32"),  # single slots, MHA
    SparseSpec(1, 8, 128, (300, 40), 1, 150, "bfloat16"),
    SparseSpec(1, 4, 256, (192, 130), 64, 2, "float16"),
    SparseSpec(1, 2, 128, (130, 131), 10, 6, "float32", softcap=20.0),  # powers of two nowhere
    SparseSpec(1, 4, 128, (96, 70), 16, 3, "bfloat16", bits=8),
    SparseSpec(1, 4, 64, (96, 70), 1, 30, "float32", bits=4),
    *(
        SparseSpec(b, 4, 128, _LONG, p, 4096 // p, host=host, **_TIMED)
        for b, host in ((1, False), (8, False), (8, True))
        for p in (16, 1)
    ),
    SparseSpec(8, 4, 128, _LONG, 16, 256, bits=8, **_TIMED),
)


def _candidates(spec: SparseSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(tile, programs, warps, stages)
        for tile in (32, 64, 128)
        for programs in (528, 1056, 2112, 4224)
        for warps in (2, 4, 8)
        for stages in (1, 2, 3, 4)
    ]


OP = Op(sparse_decode_attention, SPECS, swaps=(("k", "v"),), candidates=_candidates)
