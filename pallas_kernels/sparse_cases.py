"""The cases of products with sparse activations: what those of several ops have in common."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.op import Spec

__all__ = ["CASES", "MatvecSpec", "alive", "bytes_needed", "label", "weight_size"]


def label(spec: Any) -> str:
    """Returns the name of a case, for example b1-f14336-m4096-z50-bfloat16."""
    kind = f"int8-{spec.dtype}" if spec.quantized else spec.dtype
    return f"b{spec.batch}-f{spec.rows}-m{spec.width}-z{100 * spec.zeros:.0f}-{kind}"


def alive(spec: Any, key: jax.Array) -> jax.Array:
    """Returns which channels of each batch row are not left out, [B F]."""
    shape = (spec.batch, spec.rows)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, shape), axis=1), axis=1)
    return rank >= round(spec.zeros * spec.rows)


def bytes_needed(spec: Any) -> int:
    """Returns the bytes of the rows of weights expected in the union over the batch."""
    needed = round(spec.rows * (1 - spec.zeros**spec.batch))
    return needed * spec.width * weight_size(spec)


def weight_size(spec: Any) -> int:
    """Returns the bytes of a weight."""
    return 1 if spec.quantized else jnp.dtype(spec.dtype).itemsize


@dataclass(frozen=True)
class MatvecSpec(Spec):
    """Sizes in the alphabet. zeros: exact share of each batch row, at places of its own.

    quantized: int8 weights. gated: it is one of `vmmsp`, else of `spvmm`. cut: zeros are small numbers
    below a level.
    """

    batch: int
    rows: int  # F
    width: int  # M
    zeros: float
    dtype: str = "bfloat16"
    quantized: bool = False
    uses: tuple[str, ...] = ("test",)
    gated: bool = field(default=False, kw_only=True)
    cut: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """For example b1-f14336-m4096-z50-bfloat16-cut."""
        return label(self) + ("-cut" if self.cut else "")

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs; rows of weights that no batch row needs are NaN."""
        keys = jax.random.split(key, 5)
        here, values = alive(self, keys[0]), jax.random.normal(keys[1], (self.batch, self.rows))
        sparse = jnp.where(here, values, 0.0)
        made = {}
        if self.cut:
            sparse = jnp.where(here, values + jnp.sign(values), jnp.tanh(values) / 2)
            made["level"] = jnp.float32(0.75)
        made["gate" if self.gated else "x"] = sparse.astype(self.dtype)
        if self.gated:
            made["x"] = jax.random.normal(keys[2], (self.batch, self.width), self.dtype)
        weights = "w_t" if self.gated else "w"
        if self.quantized:
            made[weights] = jax.random.randint(keys[3], (self.rows, self.width), -127, 128, jnp.int8)
            n_outputs = self.rows if self.gated else self.width
            made["scale"] = jax.random.uniform(keys[4], (n_outputs,), minval=0.005, maxval=0.02)
        else:
            w = jax.random.normal(keys[3], (self.rows, self.width), self.dtype)
            made[weights] = jnp.where(here.any(axis=0)[:, None], w, jnp.nan)
        return made

    def options(self) -> dict[str, Any]:
        """Returns nothing: the arrays say all."""
        return {}

    def bytes(self) -> int:
        """Returns the bytes of the rows expected in the union over the batch."""
        return bytes_needed(self)

    def limit(self) -> float:
        """Returns the tolerance of sums over the axis that is summed."""
        return tolerance.limit(self.dtype, self.width if self.gated else self.rows)


_TUNED = ("bench", "tune")

# Batch, F, M, share of zeros, type, int8, uses: cases of both ops.
CASES = (
    (1, 512, 256, 0.5, "float32"),
    (1, 2100, 1160, 0.7, "bfloat16"),  # several steps and programs, and no multiple of anything
    (1, 256, 128, 0.0, "float32"),
    (2, 300, 200, 0.5, "bfloat16"),
    (3, 1100, 328, 0.7, "float32"),
    (8, 512, 384, 0.9, "bfloat16"),
    (1, 512, 256, 0.5, "bfloat16", True),
    (4, 300, 200, 0.7, "float32", True),
    *(
        (1, f, m, zeros, "bfloat16", False, _TUNED if zeros == 0.5 else ("bench",))
        for f, m in ((14336, 4096), (4096, 14336))
        for zeros in (0.0, 0.5, 0.7)
    ),
    (1, 4096, 4096, 0.5, "bfloat16", False, _TUNED),  # the projections of queries and outputs
    *((b, 14336, 4096, 0.5, "bfloat16", False, _TUNED) for b in (2, 4, 8)),
    *((1, f, m, 0.5, "bfloat16", True, _TUNED) for f, m in ((14336, 4096), (4096, 14336))),
    *((1, 14336, 4096, 0.5, dtype, False, ("bench",)) for dtype in ("float16", "float32")),
)
