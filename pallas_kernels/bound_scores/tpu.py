"""Bounds of scores in Pallas Mosaic: a step of the grid scores M packed blocks, of one head or more.

Heads may begin anywhere in the tile: the step scores its blocks with every head that has some of
them, nearly always one, and keeps each head's own. Blocks lie along lanes in the result.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import starts
from pallas_kernels.backend import pl, pltpu, tpu_call

__all__ = ["run"]

_TILE_ELEMENTS = 2**17  # of low and of high, per step of the grid
_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def run(q, low, high, *, n_blocks, lower):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or head sizes that the kernel does not take.
    """
    if any(x.dtype not in _TYPES for x in (q, low, high)):
        raise NotImplementedError(
            f"the kernel takes float32, bfloat16 and float16, got {q.dtype}, {low.dtype}, {high.dtype}"
        )
    batch, _, group, size = q.shape
    if size > 512:
        raise NotImplementedError(f"the kernel takes head sizes up to 512, got D={size}: use the reference")
    q, low, high = (
        x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in (q, low, high)
    )  # no float16
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -group % 8), (0, 0)))
    n = low.shape[1]
    tile = min(_TILE_ELEMENTS // max(128, size) // 128, -(-n // 128)) * 128  # M
    first = starts(n_blocks)
    edges = np.arange(0, n, tile)
    heads = np.stack(  # [2 I] first head with blocks in the tile, and the one after the last
        [
            np.searchsorted(first, edges, side="right") - 1,
            np.searchsorted(first[:-1], np.minimum(edges + tile, n), side="left"),
        ]
    ).astype(np.int32)
    rows = pl.BlockSpec((1, tile, size), lambda b, i, *_: (b, i, 0))
    out = tpu_call(
        functools.partial(_score, group=group),
        jnp.asarray(heads), jnp.asarray(first), q, low, high,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, len(edges)),
            in_specs=[pl.BlockSpec((1, *q.shape[1:]), lambda b, i, *_: (b, 0, 0, 0)), rows, rows],
            out_specs=[pl.BlockSpec((1, 1, tile), lambda b, i, *_: (b, 0, i))] * (1 + lower),
        ),
        out_shape=(jax.ShapeDtypeStruct((batch, 1, n), jnp.float32),) * (1 + lower),
        semantics=("parallel", "parallel"), vmem_bytes=14 * 2**20, name="bound_scores",
    )  # fmt: skip
    return (out[0][:, 0], out[1][:, 0]) if lower else out[0][:, 0]


def _score(
    heads_ref,  # [2 I] in SMEM
    first_ref,  # [K+1] in SMEM: first block of each head
    q_ref,  # [1 K X D]; X pads G to whole sublanes
    low_ref,  # [1 M D]
    high_ref,  # [1 M D]
    *out_refs,  # [1 1 M] upper, and lower where asked for
    group: int,
):
    """Scores one tile of blocks."""
    i, tile = pl.program_id(1), low_ref.shape[1]
    dtype = jnp.promote_types(jnp.promote_types(q_ref.dtype, low_ref.dtype), high_ref.dtype)
    low, high = (ref[0].astype(jnp.float32) for ref in (low_ref, high_ref))
    none = low > high
    low, high = (jnp.where(none, 0.0, x).astype(dtype) for x in (low, high))  # 0·inf is NaN
    # How many channels of a block say that it is empty, by a product that lays blocks along lanes.
    ones = jnp.ones((8, low.shape[1]), jnp.bfloat16)
    empty = _dot(ones, jnp.where(none, 1.0, 0.0).astype(jnp.bfloat16))[:1] > 0  # [1 M]
    block = i * tile + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)

    def score(head, bounds):
        q = q_ref[0, head].astype(jnp.float32)  # [X D]
        up, down = (x.astype(dtype) for x in (jnp.maximum(q, 0.0), jnp.minimum(q, 0.0)))
        alive = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], tile), 0) < group
        here = (block >= first_ref[head]) & (block < first_ref[head + 1])
        new = []
        for old, (a, b) in zip(bounds, ((high, low), (low, high)), strict=False):
            bound = jnp.where(alive, _dot(up, a) + _dot(down, b), -jnp.inf)
            new.append(jnp.where(here, jnp.max(bound, axis=0, keepdims=True), old))
        return tuple(new)

    none_yet = tuple(jnp.full((1, tile), -jnp.inf) for _ in out_refs)
    bounds = jax.lax.fori_loop(heads_ref[0, i], heads_ref[1, i], score, none_yet)
    for out_ref, bound in zip(out_refs, bounds, strict=True):
        out_ref[0] = jnp.where(empty, -jnp.inf, bound)


def _dot(a, b):
    """Returns a·bᵀ."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    over = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, over, precision=exact, preferred_element_type=jnp.float32)
