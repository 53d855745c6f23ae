"""Bounds of scores in Pallas Triton: a program scores a tile of M blocks of one head.

Both sums of products run on tensor cores, blocks by queries. D2 pads the channels, X the queries.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.attention import starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton

__all__ = ["Settings", "run"]

_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclass(frozen=True)
class Settings:
    """tile: blocks per program."""

    tile: int = 64
    warps: int = 4


def run(q, low, high, *, n_blocks, lower):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or head sizes that the kernel does not take.
    """
    if any(x.dtype not in _TYPES for x in (q, low, high)):
        raise NotImplementedError(
            f"the kernel takes float32, bfloat16 and float16, got {q.dtype}, {low.dtype}, {high.dtype}"
        )
    if q.shape[3] > 256:
        raise NotImplementedError(
            f"the kernel takes head sizes up to 256, got D={q.shape[3]}: use the reference"
        )
    chosen = tuning.settings(
        "bound_scores",
        Settings(),
        dtype=str(low.dtype),
        head_dim=q.shape[3],
        group=q.shape[2],
        rows=low.shape[0] * low.shape[1],
    )
    tile = chosen.tile
    if jnp.float32 in (q.dtype, low.dtype, high.dtype):  # no tensor cores: long code for large tiles
        tile = max(16, min(tile, 4096 // _padded(q.shape[3])))
    items = _items(n_blocks, tile)
    out = gpu_call(
        functools.partial(_score, tile=tile),
        jnp.asarray(items), q, low, high,
        grid=(len(items), q.shape[0]),
        out_shape=(jax.ShapeDtypeStruct(low.shape[:2], jnp.float32),) * (1 + lower),
        warps=chosen.warps, stages=1, name="bound_scores",
    )  # fmt: skip
    return tuple(out) if lower else out[0]


def _items(n_blocks: tuple[int, ...], tile: int) -> np.ndarray:
    """Returns the work [I 3]: head, first packed block, blocks."""
    first = starts(n_blocks)
    return np.array(
        [
            (head, first[head] + at, min(n - at, tile))
            for head, n in enumerate(n_blocks)
            for at in range(0, n, tile)
        ],
        np.int32,
    )


def _score(
    items_ref,  # [I 3] head, first block, blocks
    q_ref,  # [B K G D]
    low_ref,  # [B N D]
    high_ref,  # [B N D]
    *out_refs,  # [B N] upper, and lower where asked for
    tile: int,  # M
):
    """Scores one tile of blocks."""
    item, batch = program_id(0), program_id(1)
    head, first, n = (items_ref[item, i] for i in range(3))
    group, size = q_ref.shape[2:]
    at, g, d = (jnp.arange(m) for m in (tile, _padded(group), _padded(size)))
    width = (d < size)[None, :]
    mask = (at < n)[:, None] & width
    rows = (first + at)[:, None]
    low = triton.load(low_ref.at[batch, rows, d[None, :]], mask=mask, other=0)  # [M D2]
    high = triton.load(high_ref.at[batch, rows, d[None, :]], mask=mask, other=0)
    q = triton.load(q_ref.at[batch, head, g[:, None], d[None, :]], mask=(g < group)[:, None] & width, other=0)
    dtype = jnp.promote_types(jnp.promote_types(q.dtype, low.dtype), high.dtype)
    low, high, q = (x.astype(dtype) for x in (low, high, q))
    none = low.astype(jnp.float32) > high.astype(jnp.float32)
    empty = jnp.max(jnp.where(none, 1, 0), axis=1) > 0  # [M]
    low, high = (
        jnp.where(none, 0.0, x.astype(jnp.float32)).astype(dtype) for x in (low, high)
    )  # 0·inf is NaN
    up, down = jnp.maximum(q, 0).T, jnp.minimum(q, 0).T  # [D2 X]
    for out_ref, (a, b) in zip(out_refs, ((high, low), (low, high)), strict=False):
        bound = _dot(a, up) + _dot(b, down)  # [M X]
        bound = jnp.max(jnp.where((g < group)[None, :], bound, -jnp.inf), axis=1)
        triton.store(out_ref.at[batch, first + at], jnp.where(empty, -jnp.inf, bound), mask=at < n)


def _padded(n: int) -> int:
    return max(16, pl.next_power_of_2(n))


def _dot(a, b):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)
