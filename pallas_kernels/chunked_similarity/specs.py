"""The cases of chunked similarity that are tested, timed and tuned."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tolerance
from pallas_kernels.attention import starts
from pallas_kernels.chunked_similarity import chunked_similarity, gpu
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "SimilaritySpec"]


@dataclass(frozen=True)
class SimilaritySpec(Spec):
    """Sizes in the alphabet. full: no empty slots."""

    batch: int
    head_dim: int
    slots: tuple[int, ...]
    chunk: int
    dtype: str = "bfloat16"
    stride: int = 2
    kind: str = "cosine"
    full: bool = False
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b2-k8-d128-s4096-c256-bfloat16-cosine."""
        most, mean = max(self.slots), sum(self.slots) // len(self.slots)
        s = f"s{most}" if most == mean else f"s{most}of{mean}"
        by = "" if self.stride == 2 else f"by{self.stride}"
        heads = f"b{self.batch}-k{len(self.slots)}-d{self.head_dim}"
        return f"{heads}-{s}-c{self.chunk}{by}-{self.dtype}-{self.kind}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs. Unless full, a fifth of the slots is empty and a tenth repeats a neighbour's key."""
        keys = jax.random.split(key, 3)
        k = jax.random.normal(keys[0], (self.batch, sum(self.slots), self.head_dim), self.dtype)
        mass = jnp.ones(k.shape[:2])
        if not self.full:
            again = jax.random.uniform(keys[1], mass.shape) < 0.1
            k = jnp.where(again[..., None], jnp.roll(k, 1, axis=1), k)
            mass = jnp.where(jax.random.uniform(keys[2], mass.shape) < 0.2, 0.0, mass)
            k = jnp.where((mass > 0)[..., None], k, jnp.nan)
        return {"k": k, "mass": mass}

    def options(self) -> dict[str, Any]:
        """Returns the static arguments."""
        return {"slots": self.slots, "chunk": self.chunk, "stride": self.stride, "kind": self.kind}

    def bytes(self) -> int:
        """Returns the bytes of keys and masses, and of an index and a similarity per slot."""
        return self.batch * sum(self.slots) * (jnp.dtype(self.dtype).itemsize * self.head_dim + 12)

    def limit(self) -> float:
        """Returns the tolerance of float32 sums over D: products of keys are exact or nearly so."""
        return tolerance.limit("float32", self.head_dim)


def error(out: Any, expected: Any, inputs: dict[str, Any]) -> float:
    """Returns how far matches are from the best and their similarities from the truth, in float64.

    Of destinations that are nearly equal any is right, so a match counts by its own similarity. The
    unit is what the similarity is a difference of: 1, |a||b|, or (|a| + |b|)².
    """
    (best, value), (ideal, most) = ([np.asarray(x) for x in pair] for pair in (out, expected))
    chunk, stride = inputs["chunk"], inputs["stride"]
    mass = np.asarray(inputs["mass"])
    if best.shape != ideal.shape or value.shape != most.shape:
        return math.inf
    found, first = ideal >= 0, starts(inputs["slots"])
    head = np.searchsorted(first, np.arange(mass.shape[1]), side="right") - 1
    slot = np.arange(mass.shape[1]) - first[head]
    if (
        np.any((best < 0) == found)
        or np.any(value[~found] != -np.inf)
        or not np.all(np.isfinite(value[found]))
    ):
        return math.inf
    worst = 0.0
    for row in range(len(best)):  # a row at a time: the keys in float64 are large
        at = np.flatnonzero(found[row])
        to = best[row, at]
        same = (to // chunk == slot[at] // chunk) & (to % chunk % stride == stride - 1)
        if not np.all(same & (to < np.asarray(inputs["slots"])[head[at]])):
            return math.inf
        a, b = (np.asarray(inputs["k"][row], np.float64)[rows] for rows in (at, first[head[at]] + to))
        if not np.all(mass[row, first[head[at]] + to] > 0):
            return math.inf
        exact, unit = _exact(a, b, inputs["kind"])
        gap = np.maximum(np.abs(value[row, at] - exact), most[row, at] - exact)
        worst = max(worst, float((gap / unit).max(initial=0.0)))
    return worst


def _exact(a: np.ndarray, b: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the similarity of rows, and the unit of its error."""
    product, norms = np.sum(a * b, axis=1), [np.linalg.norm(x, axis=1) for x in (a, b)]
    tiny = np.finfo(np.float64).tiny
    if kind == "l2":
        return -np.sum((a - b) ** 2, axis=1), np.maximum((norms[0] + norms[1]) ** 2, tiny)
    unit = np.maximum(norms[0] * norms[1], tiny)
    return (product, unit) if kind == "dot" else (product / unit, np.ones_like(unit))


_TIMED = {"full": True, "uses": ("bench", "tune")}

SPECS = (
    SimilaritySpec(2, 64, (128, 128), 64, "float32"),
    SimilaritySpec(2, 128, (256, 96), 64),
    SimilaritySpec(1, 80, (96,), 32, "float16", kind="dot"),
    SimilaritySpec(1, 128, (600,), 600, "bfloat16", kind="l2"),  # a head is one chunk, in several tiles
    SimilaritySpec(3, 64, (7, 320, 40, 1), 48, "float32"),  # ragged, and no multiple of anything
    SimilaritySpec(1, 64, (160, 64), 32, "bfloat16", stride=4, kind="l2"),
    SimilaritySpec(2, 64, (100,), 50, "float32", stride=3, kind="dot"),
    SimilaritySpec(1, 256, (512,), 256),
    *(SimilaritySpec(8, 128, (32768,) * 8, c, **_TIMED) for c in (64, 256)),
    SimilaritySpec(8, 128, (32768,) * 8, 256, stride=4, **_TIMED),
    SimilaritySpec(1, 128, (8192,) * 8, 256, **_TIMED),
    SimilaritySpec(8, 128, (163840, *(14048,) * 7), 256, **_TIMED),
    SimilaritySpec(8, 128, (4096,) * 8, 4096, **_TIMED),
)


def _candidates(spec: SimilaritySpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(sources, destinations, warps)
        for sources in (32, 64, 128)
        for destinations in (32, 64, 128)
        for warps in (1, 2, 4, 8)
    ]


OP = Op(chunked_similarity, SPECS, error=error, candidates=_candidates)
