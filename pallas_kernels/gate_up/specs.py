"""The cases of gate_up that are tested, timed and tuned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.gate_up import gate_up, gpu
from pallas_kernels.op import Op, Spec
from pallas_kernels.sparse_cases import alive, bytes_needed, label, weight_size

__all__ = ["OP", "GateUpSpec"]

_DEAD = 0.05  # how large gates are that fall below their level; the others are 1 to 3


@dataclass(frozen=True)
class GateUpSpec(Spec):
    """Sizes in the alphabet. zeros: exact share of gates below the level in each batch row."""

    batch: int
    rows: int  # F
    width: int  # M
    zeros: float
    dtype: str = "bfloat16"
    quantized: bool = False
    uses: tuple[str, ...] = ("test",)
    act: str = "silu"

    @property
    def name(self) -> str:
        """For example b1-f14336-m4096-z50-bfloat16."""
        return label(self) + ("" if self.act == "silu" else f"-{self.act}")

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs; rows of up that no batch row needs are NaN.

        Rows of the gate are sums of the batch's inputs, which are orthogonal, so that each gate is as large
        as it should be.
        """
        keys = jax.random.split(key, 6)
        here = alive(self, keys[0])
        size = jax.random.uniform(keys[1], here.shape, minval=1.0, maxval=3.0)
        size = jnp.where(here, size, _DEAD * jax.random.normal(keys[2], here.shape))
        x, _ = jnp.linalg.qr(jax.random.normal(keys[3], (self.width, self.batch)))
        x = (x.T * self.width**0.5).astype(self.dtype)  # [B M], of about 1 each
        gate_t = size.T @ x.astype(jnp.float32) / self.width
        weight = jax.random.uniform(keys[4], (self.rows,), minval=0.5, maxval=1.0)
        made = {"x": x, "level": jnp.float32(0.3), "weight": weight}
        up_t = jax.random.normal(keys[5], (self.rows, self.width))
        if self.quantized:
            pairs = [_codes(gate_t), _codes(up_t)]
            return made | {"gate_t": pairs[0][0], "up_t": pairs[1][0], "scales": tuple(p[1] for p in pairs)}
        up_t = jnp.where(here.any(axis=0)[:, None], up_t, jnp.nan)
        return made | {"gate_t": gate_t.astype(self.dtype), "up_t": up_t.astype(self.dtype)}

    def options(self) -> dict[str, Any]:
        """Returns the activation."""
        return {"act": self.act}

    def bytes(self) -> int:
        """Returns the bytes of the gate, and of the rows of up expected in the union over the batch."""
        return self.rows * self.width * weight_size(self) + bytes_needed(self)

    def limit(self) -> float:
        """Returns the tolerance of products of two sums over the width, one of them rounded twice."""
        return 2 * tolerance.limit(self.dtype, self.width)


def _codes(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns weights as int8 codes and a scale per row."""
    scale = jnp.abs(w).max(axis=1) / 127
    return jnp.round(w / scale[:, None]).astype(jnp.int8), scale


_TUNED = ("bench", "tune")
_BLOCK = (14336, 4096)  # Llama 3.1 8B's

SPECS = (
    GateUpSpec(1, 512, 256, 0.5, "float32"),
    GateUpSpec(1, 2100, 1160, 0.7),  # several steps and programs, and no multiple of anything
    GateUpSpec(1, 256, 128, 0.0, "float32", act="gelu_tanh"),
    GateUpSpec(2, 300, 200, 0.5),
    GateUpSpec(3, 1100, 328, 0.7, "float32"),
    GateUpSpec(8, 512, 384, 0.9, act="gelu_tanh"),
    GateUpSpec(1, 512, 256, 0.5, quantized=True),
    GateUpSpec(4, 300, 200, 0.7, "float32", quantized=True),
    *(GateUpSpec(1, *_BLOCK, z, uses=_TUNED if z == 0.5 else ("bench",)) for z in (0.0, 0.5, 0.7)),
    *(GateUpSpec(b, *_BLOCK, 0.5, uses=_TUNED) for b in (2, 4, 8)),
    GateUpSpec(1, *_BLOCK, 0.5, quantized=True, uses=_TUNED),
)


def _candidates(spec: GateUpSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(rows, loads, warps)
        for rows in ((1, 2, 4) if spec.batch == 1 else (16, 32, 64))
        for loads in (1, 2, 4, 8)
        for warps in (2, 4, 8, 16)
    ]


OP = Op(gate_up, SPECS, candidates=_candidates)
