"""What the two products of sparse activations share: the rules for their inputs, and their cases."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import tolerance
from pallas_kernels.op import Spec

__all__ = [
    "CASES",
    "MAX_BATCH",
    "MatvecSpec",
    "block_order",
    "check_scale",
    "check_weights",
    "cut",
    "refuse",
    "settings_key",
]

MAX_BATCH = 8


def check_weights(x: Array, active: Array, w: Array, scale: Array | None, n_outputs: int) -> None:
    """Raises where the weights [F M] do not fit the inputs.

    active: [B F], whose zeros say which rows are not read. n_outputs: that of the output's channels.
    """
    if w.shape[0] != active.shape[1]:
        raise ValueError(
            f"weights have a row per sparse channel, {active.shape[1]}, got {w.shape=}: "
            f"they lie as [F M], the sparse axis first"
        )
    check_scale(w, scale, n_outputs)
    if x.dtype != active.dtype:
        raise ValueError(f"inputs are of one type, got {x.dtype} and {active.dtype}: convert one of them")


def check_scale(w: Array, scale: Array | None, n_outputs: int) -> None:
    """Raises where weights are neither floats nor int8, or have no scales as theirs are."""
    if not (jnp.issubdtype(w.dtype, jnp.floating) or w.dtype == jnp.int8):
        raise TypeError(f"weights are floats or int8, got {w.dtype=}")
    if (w.dtype == jnp.int8) != (scale is not None):
        raise ValueError(
            f"int8 weights, and no others, come with scales, got {w.dtype=} and {scale=}: "
            f"give one scale per output channel"
        )
    if scale is not None and scale.shape != (n_outputs,):
        raise ValueError(f"there is one scale per output channel, {(n_outputs,)}, got {scale.shape=}")


def cut(x: Array, level: Array | None) -> Array:
    """Returns x with 0 for what is below a level; NaN stays."""
    return x if level is None else jnp.where(jnp.abs(x.astype(jnp.float32)) < level, 0, x)


def refuse(x: Array, w: Array, types: tuple[str, ...]) -> None:
    """Raises NotImplementedError for a batch or a type that a kernel does not take.

    types: those the back end computes in.
    """
    if x.shape[0] > MAX_BATCH:
        raise NotImplementedError(
            f"the kernel takes batches up to {MAX_BATCH}, got B={x.shape[0]}: use the dense product, "
            f"as the union of so many rows' channels is nearly all of them"
        )
    if x.dtype.name not in types:
        raise NotImplementedError(f"the kernel takes {', '.join(types)}, got {x.dtype=}: convert x")
    if w.dtype not in (x.dtype, jnp.int8):
        raise NotImplementedError(f"weights are int8 or of x's type, got {w.dtype} for {x.dtype}: convert w")


def settings_key(x: Any, w: Any) -> dict[str, int | str]:
    """Returns what the best settings of a GPU kernel for weights [F M] depend on.

    What does not fit a multiprocessor's shared memory differs by words: the types, and which of the op's two
    kernels runs.
    """
    words = {"dtype": w.dtype.name, "inputs": x.dtype.name, "kernel": "batch" if x.shape[0] > 1 else "one"}
    return words | {"batch": x.shape[0], "rows": w.shape[0], "width": w.shape[1]}


def block_order(active: Array, rows: int) -> tuple[Array, Array]:
    """Returns the blocks of rows, those with a non-zero first, [N], and how many those are, [1].

    active: [B F]. The order of each kind is kept, so that memory is read forwards.
    """
    flags = jnp.pad(jnp.any(active != 0, axis=0), (0, -active.shape[1] % rows))
    flags = flags.reshape(-1, rows).any(axis=1)
    order = jnp.argsort(~flags, stable=True).astype(jnp.int32)
    return order, flags.sum(dtype=jnp.int32)[None]


@dataclass(frozen=True)
class MatvecSpec(Spec):
    """Sizes in the alphabet. zeros: exact share of each batch row, at places of its own.

    quantized: int8 weights. gated: the case is one of `vmmsp`, else of `spvmm`. cut: zeros are small numbers
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
        """For example b1-f14336-m4096-z50-bfloat16."""
        kind = f"int8-{self.dtype}" if self.quantized else self.dtype
        below = "-cut" if self.cut else ""
        return f"b{self.batch}-f{self.rows}-m{self.width}-z{100 * self.zeros:.0f}-{kind}{below}"

    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes inputs; rows of weights that no batch row needs are NaN."""
        keys = jax.random.split(key, 5)
        shape = (self.batch, self.rows)
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(keys[0], shape), axis=1), axis=1)
        alive = rank >= round(self.zeros * self.rows)
        values = jax.random.normal(keys[1], shape)
        sparse = jnp.where(alive, values, 0.0)
        made = {}
        if self.cut:
            sparse = jnp.where(alive, values + jnp.sign(values), jnp.tanh(values) / 2)
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
            made[weights] = jnp.where(alive.any(axis=0)[:, None], w, jnp.nan)
        return made

    def options(self) -> dict[str, Any]:
        """Returns nothing: the arrays say all."""
        return {}

    def bytes(self) -> int:
        """Returns the bytes of the rows expected in the union over the batch."""
        active = self.rows - round(self.zeros * self.rows)
        active = round(self.rows * (1 - (1 - active / self.rows) ** self.batch))
        return active * self.width * (1 if self.quantized else jnp.dtype(self.dtype).itemsize)

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
