"""The cases of decode attention that are tested, timed and tuned."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tolerance
from pallas_kernels.attention import AttentionForm, quantize
from pallas_kernels.decode_attention import decode_attention, gpu, tpu
from pallas_kernels.op import Op, Spec

__all__ = ["OP", "DecodeSpec"]


@dataclass(frozen=True)
class DecodeSpec(Spec):
    """Sizes in the alphabet. bits: 16 stores rows, 8 and 4 codes. full: no empty slots, mass 1."""

    batch: int
    group: int
    head_dim: int
    slots: tuple[int, ...]
    dtype: str = "bfloat16"
    bits: int = 16
    softcap: float | None = None
    full: bool = False
    uses: tuple[str, ...] = ("test",)

    @property
    def name(self) -> str:
        """For example b2-k8-g4-d128-s4096-bfloat16."""
        most, mean = max(self.slots), sum(self.slots) // len(self.slots)
        s = f"s{most}" if most == mean else f"s{most}of{mean}"
        kind = self.dtype if self.bits == 16 else f"int{self.bits}-{self.dtype}"
        cap = "" if self.softcap is None else "-softcap"
        return f"b{self.batch}-k{len(self.slots)}-g{self.group}-d{self.head_dim}-{s}-{kind}{cap}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs. Unless full, a fifth of the slots is empty, clusters have masses, lengths vary."""
        keys = jax.random.split(key, 6)
        rows, n_heads = sum(self.slots), len(self.slots)
        q = jax.random.normal(keys[0], (self.batch, n_heads, self.group, self.head_dim), self.dtype)
        k, v = (jax.random.normal(x, (self.batch, rows, self.head_dim), self.dtype) for x in keys[1:3])
        mass, length = jnp.ones((self.batch, rows)), jnp.broadcast_to(jnp.asarray(self.slots), q.shape[:2])
        if not self.full:
            mass = jnp.floor(jnp.exp(jax.random.uniform(keys[3], mass.shape, maxval=3.0)))
            mass = jnp.where(jax.random.uniform(keys[4], mass.shape) < 0.2, 0.0, mass)
            length = jax.random.randint(keys[5], q.shape[:2], 0, length + 1)
        if self.bits < 16:
            k, v = quantize(k, self.bits, self.slots, 32), quantize(v, self.bits, self.slots, None)
            if not self.full:
                v = dataclasses.replace(v, scale=jnp.where((mass > 0)[..., None], v.scale, jnp.nan))
        elif not self.full:
            k, v = (jnp.where((mass > 0)[..., None], x, jnp.nan) for x in (k, v))
        return {"q": q, "k": k, "v": v, "mass": mass, "length": length.astype(jnp.int32)}

    def options(self) -> dict[str, Any]:
        """Returns the form."""
        return {"form": AttentionForm(self.slots, softcap=self.softcap, lse="test" in self.uses)}

    def bytes(self) -> int:
        """Returns the bytes of K, V and the masses, each read once."""
        shapes = jax.eval_shape(self.arrays, jax.random.key(0))
        leaves = jax.tree.leaves((shapes["k"], shapes["v"], shapes["mass"]))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

    def limit(self) -> float:
        """Returns the tolerance of sums over the largest head."""
        return tolerance.limit(self.dtype, max(self.slots))


_EVEN = {size: (size,) * 8 for size in (4096, 8192, 32768, 131072)}
_RAGGED = (163840, *(14043,) * 6, 14046)  # the same total as 8 heads of 32,768, the largest 5 times the mean
_TIMED = {"full": True, "uses": ("bench", "tune")}

SPECS = (
    *(
        DecodeSpec(2, 4, size, (96, 96), dtype)
        for size in (64, 80, 96, 128, 256)
        for dtype in ("float32", "bfloat16")
    ),
    DecodeSpec(1, 4, 128, (160,) * 8, "float16"),
    DecodeSpec(2, 1, 64, (64,) * 4, "float32"),  # MHA
    DecodeSpec(2, 32, 128, (300,), "bfloat16"),  # MQA
    DecodeSpec(3, 32, 80, (96,) * 3, "float32"),  # so many queries that a program joins all columns of one
    DecodeSpec(3, 3, 64, (7, 320, 40, 1), "float32"),  # ragged, and no multiple of anything
    DecodeSpec(1, 8, 128, (640, 64, 64, 64), "bfloat16"),
    DecodeSpec(2, 4, 128, (200, 200), "float32", softcap=20.0),
    *(
        DecodeSpec(2, 4, d, (96, 224), t, bits=b)
        for b in (8, 4)
        for d, t in ((64, "float32"), (128, "bfloat16"))
    ),
    *(
        DecodeSpec(b, 4, 128, _EVEN[s], **_TIMED)
        for b, s in ((1, 8192), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (32, 8192))
    ),
    *(
        DecodeSpec(b, 4, 128, _EVEN[s], bits=bits, **_TIMED)
        for bits in (8, 4)
        for b, s in ((1, 131072), (8, 32768))
    ),
    DecodeSpec(8, 4, 128, _RAGGED, **_TIMED),
    DecodeSpec(8, 4, 128, (6553,) * 8, **_TIMED),  # a fifth of 32,768
    DecodeSpec(64, 6, 128, (6552,) * 2, **_TIMED),
)


def _candidates(spec: DecodeSpec) -> list[gpu.Settings | tpu.Settings]:
    on_gpu = [
        gpu.Settings(block, programs, warps, stages)
        for block in (32, 64, 128)
        for programs in (264, 528, 1056, 2112)
        for warps in (1, 2, 4, 8)
        for stages in (2, 3, 4)
    ]
    return [*on_gpu, *(tpu.Settings(block) for block in (1024, 2048, 4096, 8192))]


OP = Op(decode_attention, SPECS, swaps=(("k", "v"),), candidates=_candidates)
