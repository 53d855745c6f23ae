"""Keeps the parts of a tree of chunks in host memory, apart from K and V, but for those that change.

A part changes while its slots are written. As with rows (see `tiers`), a program never writes to the host:
the parts from the first that is not full are staged on the device, and `settled` moves them between programs.
To choose, a step has the parts of one layer copied to the device, 2·pairs/leaf of the bytes of its keys where
they are boxes, else half of that, and lets them go.

Source: LeoAM (arXiv 2506.20187), abstracts apart from K and V on every tier. Staging is ours.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax import cache, chunk_tree
from kvjax.chunk_tree import Begun, Shape, Tree
from kvjax.shapes import Leaf
from pallas_kernels import stow_rows

__all__ = ["FarTree", "near", "put", "refresh", "settled"]


@struct.dataclass
class FarTree:
    """A tree without roots, whose full parts lie on the host."""

    far: Tree  # [B ΣN·pairs D] in host memory, N leaves of a head
    new: Tree  # [B K·W D] the parts of each head from `first` on, which `begun` counts from, too
    first: Leaf  # [B K] int32


def put(tree: Tree, end: Int[Array, "B K"], slots: tuple[int, ...], shape: Shape, room: int) -> FarTree:
    """Moves a tree to the host.

    Args:
        end: slots in use of each head.
        room: tokens that may come before the next `settled`.

    Raises:
        ValueError: for a tree with roots, which are made of the parts of many slots.
    """
    if shape.root is not None:
        raise ValueError(f"roots are made of parts on the device, got root={shape.root}: take None")
    first = end // shape.box
    part = first[..., None] + jnp.arange(_width(room, shape))
    row = part + jnp.asarray(cache.starts(shape.n_parts(slots)))[:, None]
    at = jnp.where(part < jnp.asarray(shape.n_parts(slots))[:, None], row, -1).reshape(len(end), -1)
    new = _each(lambda x, none: cache.take(x, at, none), tree, (jnp.inf, -jnp.inf))
    new = new.replace(begun=_counted_from(tree.begun, first))
    return FarTree(_each(lambda x: jax.device_put(x, jax.memory.Space.Host), tree), new, first)


def refresh(
    tree: FarTree, keys: Float[Array, "B K T D"], idx: Int[Array, "B K T"], mass: Float[Array, "B R"],
    slots: tuple[int, ...], shape: Shape,
) -> FarTree:  # fmt: skip
    """Returns the tree after new keys, as `chunk_tree.refresh` does of one on the device."""
    n_heads = len(slots)
    size = tree.new.low.shape[1] // n_heads * shape.box  # slots of a head's staged parts
    starts = jnp.asarray(cache.starts(slots))[:, None]
    head = jnp.arange(n_heads)[:, None]
    begin = tree.first[..., None] * shape.box
    slot = begin + jnp.arange(size)
    row = jnp.where(slot < jnp.asarray(slots)[:, None], starts + slot, -1).reshape(len(idx), -1)
    idx = jnp.where(idx < mass.shape[1], idx - starts - begin + head * size, n_heads * size)
    each = Shape(shape.box, None, 1, shape.known_by)  # a part for itself
    new = chunk_tree.refresh(tree.new, keys, idx, cache.take(mass, row), (size,) * n_heads, each)
    return tree.replace(new=new)


def settled(
    tree: FarTree, end: Int[Array, "B K"], room: int, slots: tuple[int, ...], shape: Shape
) -> FarTree:
    """Moves staged parts to the host; those that are not full stay on the device too. The tree is consumed.

    Args:
        end: slots in use of each head.
        room: tokens that may come before the next call.
    """
    far, new, first = _settled(tree.far, tree.new, tree.first, end, room=room, slots=slots, shape=shape)
    return FarTree(far, new, first)


@functools.partial(jax.jit, static_argnames=("room", "slots", "shape"), donate_argnames="far")
def _settled(
    far: Tree, new: Tree, first: Array, end: Array, *, room: int, slots: tuple, shape: Shape
) -> tuple:
    """Returns what `settled` does, in parts."""
    opened, last, parts = end // shape.box, -(-end // shape.box), shape.n_parts(slots)
    by_head = lambda x: x.reshape(*first.shape, -1, x.shape[-1])  # noqa: E731
    far = _each(lambda x, y: stow_rows(x, by_head(y), first, last, slots=parts), far, new)

    def kept(x: Array, none: float) -> Array:
        at = (opened - first)[..., None, None]
        x = by_head(x)
        begun = jnp.take_along_axis(x, jnp.minimum(at, x.shape[2] - 1), axis=2)
        begun = jnp.where(at < x.shape[2], begun, none)
        others = ((0, 0), (0, 0), (0, _width(room, shape) - 1), (0, 0))
        return jnp.pad(begun, others, constant_values=none).reshape(len(x), -1, x.shape[3])

    begun = _counted_from(new.begun, opened - first)
    return far, _each(kept, new, (jnp.inf, -jnp.inf)).replace(begun=begun), opened


def near(tree: FarTree, q: Array, slots: tuple[int, ...], shape: Shape) -> tuple[Tree, Array]:
    """Returns the whole tree on the device, and q, before which it is not copied."""
    parts = shape.n_parts(slots)
    far, q = jax.lax.optimization_barrier((tree.far, q))  # else a loop copies all layers when it begins
    part = tree.first[..., None] + jnp.arange(tree.new.low.shape[1] // len(slots))
    row = part + jnp.asarray(cache.starts(parts))[:, None]
    at = jnp.where(part < jnp.asarray(parts)[:, None], row, sum(parts)).reshape(len(q), -1)
    b = jnp.arange(len(q))[:, None]
    here = lambda x: jax.device_put(x, jax.memory.Space.Device)  # noqa: E731
    return _each(lambda x, y: here(x).at[b, at].set(y, mode="drop"), far, tree.new), q


def _counted_from(begun: Begun | None, first: Array) -> Begun | None:
    """Counts parts from others; one before them is none that can be written on."""
    if begun is None:
        return None
    return begun.replace(part=jnp.where(begun.part >= first, begun.part - first, -1))


def _width(room: int, shape: Shape) -> int:
    """Returns how many parts `room` neighbouring slots touch."""
    return (room + shape.box - 2) // shape.box + 1


def _each(change: Callable[..., Array], tree: Tree, *others: Any) -> Tree:
    """Changes both ends of the parts; of others, that are trees or pairs, each end is given."""
    ends = [(x.low, x.high) if isinstance(x, Tree) else x for x in (tree, *others)]
    low, high = (None if end[0] is None else change(*end) for end in zip(*ends, strict=True))
    return Tree(low, high, *(jnp.zeros((len(low), 0, low.shape[2]), low.dtype) for _ in range(2)))
