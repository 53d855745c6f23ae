"""The cases of slots chosen by their codes that are tested, timed and tuned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.op import Op, Spec
from pallas_kernels.vq_topk import gpu, histogram, marked, vq_topk

__all__ = ["OP", "ChoiceSpec"]

_MARKED = 12  # slots of a head that are marked


@dataclass(frozen=True)
class ChoiceSpec(Spec):
    """Sizes in the alphabet. few: codewords that most slots have, so that thresholds cut through them.

    dtype: of queries and codewords.
    """

    batch: int
    heads: int
    group: int
    head_dim: int
    codes: int
    slots: int
    k: int
    few: int = 0
    dtype: str = "float32"
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b8-k8-g4-d128-c4096-s32768-top983-bfloat16."""
        heads = f"b{self.batch}-k{self.heads}-g{self.group}-d{self.head_dim}"
        few = f"-few{self.few}" if self.few else ""
        return f"{heads}-c{self.codes}-s{self.slots}-top{self.k}{few}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs of whole numbers, whose products are exact and often equal; rows choose k and less."""
        keys = jax.random.split(key, 6)
        whole = lambda key, *shape: jax.random.randint(key, shape, -4, 5).astype(self.dtype)  # noqa: E731
        shape = (self.batch, self.heads, self.slots)
        codes = jax.random.randint(keys[0], shape, 0, self.codes)
        if self.few:
            codes = jnp.where(jax.random.uniform(keys[1], shape) < 0.8, codes % self.few, codes)
        codes = jnp.where(jax.random.uniform(keys[2], shape) < 0.1, -1, codes)
        slot = jnp.arange(self.slots)
        at_ends = (slot < _MARKED // 2) | (slot >= self.slots - _MARKED // 2)
        codes = jnp.where(at_ends & (codes >= 0), marked(codes), codes).astype(jnp.int16)
        n = jnp.maximum(1, self.k - jnp.arange(self.batch) % 3 * (self.k // 3))
        return {
            "q": whole(keys[3], self.batch, self.heads, self.group, self.head_dim),
            "codebook": whole(keys[4], self.heads, self.codes, self.head_dim),
            "codes": codes, "counts": histogram(codes, self.codes), "n": n,
        }  # fmt: skip

    def options(self) -> dict[str, Any]:
        """Returns k and n_always."""
        return {"k": self.k, "n_always": min(_MARKED, self.slots)}

    def bytes(self) -> int:
        """Returns the bytes of the codes, the codebook, the counts, and the indices."""
        limit = min(self.group * self.k + _MARKED, self.slots)
        per_head = 2 * self.slots + 4 * self.codes + 4 * limit
        words = self.heads * self.codes * self.head_dim * jnp.dtype(self.dtype).itemsize
        return self.batch * self.heads * per_head + words

    def limit(self) -> float:
        """Indices are the reference's."""
        return 0.0


_TIMED = ("bench", "tune")

SPECS = (
    ChoiceSpec(2, 2, 4, 64, 200, 3000, 90, dtype="bfloat16"),
    ChoiceSpec(3, 2, 3, 32, 130, 5000, 700, few=3),
    ChoiceSpec(4, 1, 1, 16, 40, 300, 300),  # MHA; a head may choose all
    ChoiceSpec(1, 1, 8, 128, 64, 5, 2),
    ChoiceSpec(8, 8, 4, 128, 4096, 32768, 983, dtype="bfloat16", uses=_TIMED),
    ChoiceSpec(45, 8, 4, 128, 4096, 32768, 983, dtype="bfloat16", uses=_TIMED),
    ChoiceSpec(1, 8, 4, 128, 4096, 131072, 2048, dtype="bfloat16", uses=_TIMED),
    ChoiceSpec(1, 8, 4, 128, 4096, 524288, 7864, dtype="bfloat16", uses=_TIMED),
)


def _candidates(spec: ChoiceSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(programs, block, warps, bound_warps)
        for programs in (264, 528, 1056)
        for block in (2048, 4096, 8192, 16384)
        for warps in (4, 8, 16, 32)
        for bound_warps in (1, 2, 4, 8)
    ]


OP = Op(vq_topk, SPECS, candidates=_candidates)
