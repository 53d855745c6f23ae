"""The cases of spvmm_each that are tested, timed and tuned: the projections of attention."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.op import Op, Spec
from pallas_kernels.spvmm_each import gpu, spvmm_each

__all__ = ["OP", "EachSpec"]


@dataclass(frozen=True)
class EachSpec(Spec):
    """Sizes in the alphabet; widths: M of each matrix. zeros: share that each leaves out; 0 has no level."""

    batch: int
    rows: int  # F
    widths: tuple[int, ...]
    zeros: tuple[float, ...]
    dtype: str = "bfloat16"
    quantized: bool = False
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b1-f4096-m4096+1024+1024-z50+0+0-bfloat16."""
        widths, zeros = (
            "+".join(f"{x:.0f}" for x in y) for y in (self.widths, [100 * z for z in self.zeros])
        )
        kind = f"int8-{self.dtype}" if self.quantized else self.dtype
        return f"b{self.batch}-f{self.rows}-m{widths}-z{zeros}-{kind}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs: |x| are ranks, so that each level leaves out its share exactly."""
        keys = jax.random.split(key, 2 + 2 * len(self.widths))
        shape = (self.batch, self.rows)
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(keys[0], shape), axis=1), axis=1)
        x = (0.1 + rank / self.rows) * jnp.where(jax.random.uniform(keys[1], shape) < 0.5, 1, -1)
        form = jnp.finfo(self.dtype)
        x = jax.lax.reduce_precision(x, form.nexp, form.nmant).astype(self.dtype)  # XLA drops casts
        size = jnp.sort(jnp.abs(x.astype(jnp.float32)).ravel())
        made = {"x": x, "ws": [], "levels": [], "scales": []}
        for i, (width, zeros) in enumerate(zip(self.widths, self.zeros, strict=True)):
            made["levels"].append(size[round(zeros * size.size)] if zeros else None)
            if self.quantized:
                w = jax.random.randint(keys[2 + i], (self.rows, width), -127, 128, jnp.int8)
                made["scales"].append(jax.random.uniform(keys[-1 - i], (width,), minval=0.005, maxval=0.02))
            else:
                w = jax.random.normal(keys[2 + i], (self.rows, width), self.dtype)
                if zeros:
                    used = (jnp.abs(x.astype(jnp.float32)) >= made["levels"][-1]).any(axis=0)
                    w = jnp.where(used[:, None], w, jnp.nan)
                made["scales"].append(None)
            made["ws"].append(w)
        return {name: x if name == "x" else tuple(x) for name, x in made.items()}

    def options(self) -> dict[str, Any]:
        """Returns nothing: the arrays say all."""
        return {}

    def bytes(self) -> int:
        """Returns the bytes of the rows expected in the union over the batch."""
        size = 1 if self.quantized else jnp.dtype(self.dtype).itemsize
        each = zip(self.widths, self.zeros, strict=True)
        return round(sum(self.rows * (1 - z**self.batch) * m for m, z in each)) * size

    def limit(self) -> float:
        """Returns the tolerance of sums over the rows."""
        return tolerance.limit(self.dtype, self.rows)


_QKV = (4096, (4096, 1024, 1024))  # Llama 3.1 8B's

SPECS = (
    EachSpec(1, 512, (256, 64), (0.5, 0.0), "float32"),
    EachSpec(1, 2100, (1160, 290, 290), (0.7, 0.0, 0.3)),  # no multiple of anything
    EachSpec(3, 300, (200, 72), (0.5, 0.0), "float32"),
    EachSpec(1, 512, (128, 64), (0.5, 0.0), quantized=True),
    *(EachSpec(1, *_QKV, (z, 0.0, 0.0), uses=("bench",)) for z in (0.5, 0.7)),  # tuned within a step
    EachSpec(1, *_QKV, (0.5, 0.0, 0.0), quantized=True, uses=("bench", "tune")),
)


def _candidates(spec: EachSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(columns, loads, programs, warps)
        for columns in (64, 128, 256, 512)
        for loads in (2, 4, 8)
        for programs in (264, 396, 528, 792, 1056)
        for warps in (4, 8, 16)
    ]


OP = Op(spvmm_each, SPECS, candidates=_candidates)
