"""The cases of vq_assign that are tested, timed and tuned."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tolerance
from pallas_kernels.op import Op, Spec
from pallas_kernels.vq_assign import gpu, vq_assign

__all__ = ["OP", "AssignSpec", "excess"]


@dataclass(frozen=True)
class AssignSpec(Spec):
    """Sizes in the alphabet."""

    batch: int
    heads: int
    tokens: int
    codes: int
    head_dim: int
    dtype: str = "bfloat16"
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b1-k8-t32768-c4096-d128-bfloat16."""
        sizes = f"b{self.batch}-k{self.heads}-t{self.tokens}-c{self.codes}-d{self.head_dim}"
        return f"{sizes}-{self.dtype}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes vectors and codewords of one distribution, the first codeword far from all."""
        keys = jax.random.split(key, 2)
        shape = (self.batch, self.heads, self.tokens, self.head_dim)
        x = jax.random.normal(keys[0], shape, self.dtype)
        codebook = jax.random.normal(keys[1], (self.heads, self.codes, self.head_dim), self.dtype)
        return {"x": x, "codebook": codebook.at[:, 0].add(2.0)}

    def options(self) -> dict[str, Any]:
        """Returns none: all arguments are arrays."""
        return {}

    def bytes(self) -> int:
        """Returns the bytes of the vectors, the codewords and the codes."""
        vectors = self.heads * (self.batch * self.tokens + self.codes)
        return (
            vectors * self.head_dim * jnp.dtype(self.dtype).itemsize
            + self.batch * self.heads * self.tokens * 2
        )

    def limit(self) -> float:
        """Returns the rounding of a float32 sum of D products, whose operands no type rounds."""
        return tolerance.limit("float32", self.head_dim)


def excess(out: Any, expected: Any, arrays: dict[str, Any]) -> float:
    """Returns how much farther the codewords lie than the expected ones, in float64: near ties pass.

    The largest ‖x − c‖² − ‖x − c'‖², relative to ‖x‖² + ‖c‖², what the distance is a difference of.
    """
    x, codebook = (np.asarray(arrays[name], np.float64) for name in ("x", "codebook"))
    out, expected = np.asarray(out, np.int64), np.asarray(expected, np.int64)
    if out.shape != expected.shape or out.min() < 0 or out.max() >= codebook.shape[1]:
        return math.inf
    heads = np.arange(codebook.shape[0])[:, None]
    chosen, best = codebook[heads, out], codebook[heads, expected]
    gap = np.square(x - chosen).sum(-1) - np.square(x - best).sum(-1)
    return float(np.max(gap / (np.square(x).sum(-1) + np.square(chosen).sum(-1))))


SPECS = (
    AssignSpec(1, 2, 200, 300, 128, "float32"),
    AssignSpec(2, 2, 130, 256, 64, "bfloat16"),
    AssignSpec(1, 1, 300, 1000, 80, "float32"),
    AssignSpec(1, 2, 70, 130, 96, "bfloat16"),
    AssignSpec(1, 1, 40, 64, 256, "float32"),
    AssignSpec(3, 2, 1, 520, 128, "bfloat16"),  # a decode step
    AssignSpec(1, 4, 1, 5, 64, "float32"),
    *(
        AssignSpec(b, 8, t, 4096, 128, dtype, uses=("bench", "tune"))
        for b, t, dtype in (
            (1, 32768, "bfloat16"),
            (1, 131072, "bfloat16"),
            (1, 32768, "float32"),
            (1, 1, "bfloat16"),
            (8, 1, "bfloat16"),
        )
    ),
    AssignSpec(1, 1, 81920, 4096, 128, "float32", uses=("bench", "tune")),  # a step of k-means
    AssignSpec(1, 1, 81920, 4096, 256, "float32", uses=("bench",)),  # larger heads than were tuned
)


def _candidates(spec: AssignSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(vectors, codewords, programs, warps, stages)
        for vectors in (64, 128)
        for codewords in (32, 64, 128)
        for programs in ((264,) if spec.tokens > 1 else (264, 528, 1056))
        for warps in (4, 8)
        for stages in (2, 3, 4)
    ]


OP = Op(vq_assign, SPECS, error=excess, candidates=_candidates)
