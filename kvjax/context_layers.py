"""Writes the arrays of one layer of a context to a file of blocks, and reads them.

The arrays lie one after the other, bit by bit as they are; a manifest has their shapes and types.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import blocks, disk, measure
from kvjax.cache import KV, Layer
from kvjax.chunk_store import Store
from kvjax.method import CacheMethod

__all__ = ["file_bytes", "parts", "read", "shapes", "write"]

_BLOCK_BYTES = 2**20 - 2**10  # of a payload, so that a block with its seal takes 1 MiB


def parts(kv: KV, store: Store | None) -> tuple:
    """Returns what is written of a layer: its state, or that without rows and the rows of no full chunk."""
    return (kv,) if store is None else (kv.replace(tier=None), store.end.astype(np.int32), store.tail)


def file_bytes(tree: Any) -> int:
    """Returns the bytes of the file that holds a layer."""
    return (-(-measure.nbytes(tree) // _BLOCK_BYTES) + 1) * blocks.stride_of(_BLOCK_BYTES)


def write(path: Path, slots: Sequence[int], tree: Any, generation: int) -> dict[str, Any]:
    """Writes one layer's arrays, one after the other, and returns what they are."""
    arrays = [np.asarray(x) for x in jax.tree.leaves(tree)]
    whole = b"".join(x.tobytes() for x in arrays)
    with blocks.create(path, _BLOCK_BYTES, generation) as file:
        for i, start in enumerate(range(0, len(whole), _BLOCK_BYTES)):
            file.write(i, memoryview(whole)[start : start + _BLOCK_BYTES])
        file.sync()
    return {"slots": list(slots), "leaves": [[list(x.shape), x.dtype.name] for x in arrays]}


def read(path: Path, saved: Mapping[str, Any], generation: int, made: Any) -> Any:
    """Reads one layer into a tree of that structure."""
    sizes = [(tuple(shape), jnp.dtype(name)) for shape, name in saved["leaves"]]
    n_bytes = [int(np.prod(shape)) * kind.itemsize for shape, kind in sizes]
    try:
        with blocks.open_blocks(path) as file:
            if file.generation != generation:
                raise blocks.DamagedBlock(
                    f"a file is of the manifest's generation, got {file.generation} for {generation} in "
                    f"{str(path)!r}"
                )
            n = -(-sum(n_bytes) // file.block_bytes)
            whole = b"".join(file.read(i) for i in range(n))
    except FileNotFoundError as error:
        raise blocks.DamagedBlock(
            f"a context has a file for each layer, got none at {str(path)!r}"
        ) from error
    if len(whole) != sum(n_bytes):
        raise blocks.DamagedBlock(f"a layer has {sum(n_bytes)} bytes, got {len(whole)} in {str(path)!r}")
    starts = np.cumsum([0, *n_bytes])
    leaves = [
        jnp.asarray(np.frombuffer(whole[start : start + n], kind).reshape(shape))
        for start, n, (shape, kind) in zip(starts, n_bytes, sizes, strict=False)
    ]
    return jax.tree.unflatten(jax.tree.structure(made), leaves)


def shapes(method: CacheMethod, layer: Layer, saved: Mapping[str, Any], dtype: Any) -> Any:
    """Returns what `parts` gives of a layer, in shapes: as it is made, or as it is once compressed.

    Raises:
        ValueError: where the method makes neither.
    """
    sizes, slots = [(tuple(shape), jnp.dtype(name)) for shape, name in saved["leaves"]], tuple(saved["slots"])
    batch = sizes[0][0][0]
    made = jax.eval_shape(lambda: method.init(layer, batch, slots, dtype))
    if disk.on_disk(made):
        at = disk.layout_of(made)
        number = lambda *shape, kind: jax.ShapeDtypeStruct((batch, at.n_heads, *shape), kind)  # noqa: E731
        found = [(made.replace(tier=None), number(kind=jnp.int32), number(*at.rows, kind=dtype))]
    else:
        queries = (batch, method.n_queries, layer.n_kv_heads, layer.group, layer.head_dim)
        pos = jax.ShapeDtypeStruct(queries[:2], jnp.int32)
        q = jax.ShapeDtypeStruct(queries, dtype)
        found = [(made,), (jax.eval_shape(method.compress, made, q, pos),)]
    for tree in found:
        if [(x.shape, x.dtype) for x in jax.tree.leaves(tree)] == sizes:
            return tree
    raise ValueError(
        f"a context has the arrays that its method makes, got others than those of {method} in "
        f"{jnp.dtype(dtype)}"
    )
