"""The cases of vq_scores that are tested, timed and tuned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tolerance
from pallas_kernels.op import Op, Spec
from pallas_kernels.vq_scores import ALWAYS, gpu, vq_scores

__all__ = ["OP", "ScoresSpec"]


@dataclass(frozen=True)
class ScoresSpec(Spec):
    """Sizes in the alphabet. dtype: of q and the codebook. out: of the scores."""

    batch: int
    heads: int
    group: int
    head_dim: int
    codes: int
    slots: int
    dtype: str = "bfloat16"
    out: str = "float32"
    reduce: str | None = None
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b1-k8-g4-d128-c4096-s131072-bfloat16-to-float32."""
        heads = f"b{self.batch}-k{self.heads}-g{self.group}-d{self.head_dim}"
        how = f"{self.dtype}-to-{self.out}" + (f"-{self.reduce}" if self.reduce else "")
        return f"{heads}-c{self.codes}-s{self.slots}-{how}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs; in tests a fifth of the slots is empty and a tenth ranks first."""
        keys = jax.random.split(key, 5)
        q = jax.random.normal(keys[0], (self.batch, self.heads, self.group, self.head_dim), self.dtype)
        codebook = jax.random.normal(keys[1], (self.heads, self.codes, self.head_dim), self.dtype)
        shape = (self.batch, self.heads, self.slots)
        codes = jax.random.randint(keys[2], shape, 0, self.codes).astype(jnp.int16)
        if "test" in self.uses:
            codes = jnp.where(jax.random.uniform(keys[3], shape) < 0.2, jnp.int16(-1), codes)
            codes = jnp.where(jax.random.uniform(keys[4], shape) < 0.1, jnp.int16(ALWAYS), codes)
        return {"q": q, "codebook": codebook, "codes": codes}

    def options(self) -> dict[str, Any]:
        """Returns the reduction and the type of the scores."""
        return {"reduce": self.reduce, "dtype": self.out}

    def bytes(self) -> int:
        """Returns the bytes of the codes, the codebook and the scores."""
        codebook = self.heads * self.codes * self.head_dim * jnp.dtype(self.dtype).itemsize
        scores = (1 if self.reduce else self.group) * jnp.dtype(self.out).itemsize
        return codebook + self.batch * self.heads * self.slots * (2 + scores)

    def limit(self) -> float:
        """Returns the tolerance of sums over D, rounded to the type of the scores: operands are exact."""
        return tolerance.limit(self.out, self.head_dim)


_TIMED = {"uses": ("bench", "tune")}

SPECS = (
    ScoresSpec(2, 2, 4, 64, 200, 300, "float32"),
    ScoresSpec(1, 8, 4, 128, 512, 1000),
    ScoresSpec(1, 8, 4, 128, 256, 300, out="bfloat16"),
    ScoresSpec(2, 4, 3, 80, 300, 129, "float32", reduce="max"),
    ScoresSpec(5, 2, 1, 96, 130, 260, "bfloat16"),  # MHA, and ten rows
    ScoresSpec(1, 1, 8, 256, 128, 1, "float32"),  # one row, one slot
    ScoresSpec(1, 1, 16, 64, 1000, 520, "bfloat16", reduce="max", out="bfloat16"),
    ScoresSpec(3, 1, 5, 128, 64, 200, "float16"),
    *(
        ScoresSpec(b, 8, 4, 128, 4096, s, **how, **_TIMED)
        for s in (32768, 131072)
        for b in (1, 8)
        for how in ({}, {"out": "bfloat16"}, {"reduce": "max"})
    ),
)


def _candidates(spec: ScoresSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(programs, scores, batch, warps)
        for programs in (132, 264, 528, 1056)
        for scores in (4096, 8192, 16384)
        for batch in (1, 2, 4)
        for warps in (4, 8, 16, 32)
    ]


def error(out: Any, expected: Any, inputs: dict[str, Any]) -> float:
    """Returns the largest relative error of a KV head's scores: those of one row may be one, and cancel."""
    return tolerance.error(*(np.asarray(x, np.float32).reshape(*x.shape[:2], -1) for x in (out, expected)))


OP = Op(vq_scores, SPECS, error=error, candidates=_candidates)
