"""Keeps abstracts of a layer's keys in a tree of two levels of chunks.

    leaf    neighbouring slots of a head, in `pairs` parts; a part is known by a box, the smallest and the
            largest of its keys per channel, by their mean, or by the middle of the box
    root    neighbouring leaves; its box is the smallest and the largest of what its leaves' parts have

A box bounds the products of its keys with any query, and a root's box those of its leaves' parts, be they
boxes, means or middles. A part without keys has inf for these, and a box of low = inf > high = -inf.
Of middles, the part of each head that was written last has its box kept beside, for keys that follow; so
middles may be codes of 8 bits, which no key is added to.

Source: LeoAM (arXiv 2506.20187), a light abstract of each chunk and chunks of several sizes in a tree. The
paper gives no formulas: boxes are those of Quest (arXiv 2406.10774); parts, means, middles and codes are
ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from kvjax import cache
from kvjax.shapes import Leaf, Rows
from kvjax.vector_codes import coded
from pallas_kernels import block_bounds

__all__ = ["KINDS", "Begun", "Shape", "Tree", "build", "empty", "refresh"]

KINDS = ("box", "mean", "middle")


@dataclass(frozen=True)
class Shape:
    """How the slots of a head lie in a tree.

    Args:
        leaf: slots of a leaf.
        root: slots of a root, None for no roots: all leaves are evaluated.
        pairs: parts of a leaf, each with a box.
        known_by: what parts have, a "box" of their keys, their "mean", or the "middle" of the box.
        bits: 8 for middles as codes, None for what parts have as it is.

    Raises:
        ValueError: where parts do not divide a leaf, or leaves a root; for another way to know parts; for
            codes of other bits, of something else than middles, or with roots.
    """

    leaf: int = 16
    root: int | None = 128
    pairs: int = 1
    known_by: str = "box"
    bits: int | None = None

    def __post_init__(self) -> None:
        if min(self.leaf, self.pairs) < 1 or self.leaf % self.pairs:
            raise ValueError(f"a leaf is `pairs` equal parts, got leaf={self.leaf}, pairs={self.pairs}")
        if self.root is not None and (self.root < self.leaf or self.root % self.leaf):
            raise ValueError(
                f"a root is one or more whole leaves, got root={self.root}, leaf={self.leaf}: "
                "take a multiple, or None"
            )
        if self.known_by not in KINDS:
            raise ValueError(f"parts are known by one of {', '.join(KINDS)}, got {self.known_by!r}")
        if self.bits is not None and (self.bits, self.known_by, self.root) != (8, "middle", None):
            raise ValueError(
                "codes have 8 bits, and are of middles without roots, got "
                f"{self.bits} bits, known_by={self.known_by!r}, root={self.root}"
            )

    @property
    def vectors(self) -> int:
        """Vectors [D] that a part has."""
        return 2 if self.known_by == "box" else 1

    @property
    def box(self) -> int:
        """Slots of a part."""
        return self.leaf // self.pairs

    @property
    def children(self) -> int:
        """Leaves of a root."""
        return 1 if self.root is None else self.root // self.leaf

    def n_leaves(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Returns how many leaves each head has."""
        return tuple(-(-s // self.leaf) for s in slots)

    def n_parts(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Returns how many parts each head has."""
        return tuple(n * self.pairs for n in self.n_leaves(slots))

    def n_roots(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Returns how many roots each head has, 0 without roots."""
        return tuple(0 if self.root is None else -(-s // self.root) for s in slots)


@struct.dataclass
class Begun:
    """The box of the part of each head that was written last."""

    low: Leaf  # [B K D]
    high: Leaf  # [B K D]
    part: Leaf  # [B K] int32, of the head's; -1 = none


@struct.dataclass
class Tree:
    """Parts and roots of a layer's chunks, head after head; N leaves and M roots of a head."""

    low: Any  # [B ΣN·pairs D] smallest key of each part, or the mean, or the middle or its codes
    high: Leaf  # [B ΣN·pairs D] largest key; None where `low` has means or middles
    root_low: Leaf  # [B ΣM D]
    root_high: Leaf  # [B ΣM D]
    begun: Begun | None = None  # with middles


def empty(batch: int, head_dim: int, dtype: Any, slots: Sequence[int], shape: Shape) -> Tree:
    """Returns the tree of slots without tokens."""
    parts, roots = sum(shape.n_parts(slots)), sum(shape.n_roots(slots))
    full = lambda n, value: jnp.full((batch, n, head_dim), value, dtype)  # noqa: E731
    high = full(parts, -jnp.inf) if shape.known_by == "box" else None
    low = full(parts, jnp.inf) if shape.bits is None else coded(full(parts, jnp.inf))
    tree = Tree(low, high, full(roots, jnp.inf), full(roots, -jnp.inf))
    if shape.known_by != "middle":
        return tree
    n, none = len(slots), jnp.full((batch, len(slots)), -1, jnp.int32)
    return tree.replace(begun=Begun(full(n, jnp.inf), full(n, -jnp.inf), none))


def build(keys: Rows, mass: Float[Array, "B R"], slots: tuple[int, ...], shape: Shape) -> Tree:
    """Returns the tree of the keys that slots hold; those of mass 0 do not count.

    Args:
        keys: as queries will meet them (rotated).

    Cost: reads B·R·D elements, writes pairs/leaf of them, of boxes twice that, and 2/root.

    Example:
        >>> keys, shape = jnp.arange(8.0).reshape(1, 8, 1), Shape(leaf=2, root=4)
        >>> tree = build(keys, jnp.ones((1, 8)), (8,), shape)
        >>> tree.high[0, :, 0].tolist(), tree.root_low[0, :, 0].tolist()
        ([1.0, 3.0, 5.0, 7.0], [0.0, 4.0])
    """
    begun = None
    if shape.known_by == "mean":
        low, high = _means(keys, mass, slots, shape), None
    else:
        bounds = block_bounds(keys, mass, slots=slots, block=shape.box)
        low, high = (
            _whole(x, value, slots, shape) for x, value in zip(bounds, (jnp.inf, -jnp.inf), strict=True)
        )
    if shape.known_by == "middle":
        begun, low, high = _last_of(low, high, slots, shape), _middles(low, high, shape), None
    none = jnp.zeros((len(keys), 0, keys.shape[2]), keys.dtype)
    tree = Tree(low, high, none, none, begun)
    if shape.root is None:
        return tree
    heads = []
    for run in cache.runs(shape.n_parts(slots)):
        n = -(-run.size // (shape.children * shape.pairs))
        every = jnp.broadcast_to(jnp.arange(n), (len(keys), run.n, n))
        heads.append([x.reshape(len(keys), -1, x.shape[-1]) for x in _root_boxes(tree, every, run, shape)])
    root_low, root_high = (jnp.concatenate(x, axis=1) for x in zip(*heads, strict=True))
    return tree.replace(root_low=root_low, root_high=root_high)


def _whole(x: Array, value: float, slots: tuple[int, ...], shape: Shape) -> Array:
    """Gives the last leaf of each head all of its parts, those beyond the slots without keys."""
    counts, parts = tuple(-(-s // shape.box) for s in slots), shape.n_parts(slots)
    if counts == parts:
        return x
    heads = []
    for run in cache.runs(counts, parts):
        room = ((0, 0), (0, 0), (0, parts[run.head] - run.size), (0, 0))
        heads.append(jnp.pad(cache.view(x, run), room, constant_values=value))
    return jnp.concatenate([h.reshape(len(x), -1, x.shape[-1]) for h in heads], axis=1)


def _middles(low: Array, high: Array, shape: Shape) -> Any:
    """Returns the middle of boxes, inf for those without keys, or its codes."""
    middle = jnp.where(low <= high, (low + high) / 2, jnp.inf)
    return middle if shape.bits is None else coded(middle)


def _last_of(low: Array, high: Array, slots: tuple[int, ...], shape: Shape) -> Begun:
    """Returns the last part of each head that has keys."""
    heads = []
    for run in cache.runs(shape.n_parts(slots)):
        own = [cache.view(x, run) for x in (low, high)]
        part = jnp.where(own[0][..., 0] <= own[1][..., 0], jnp.arange(run.size), -1).max(-1)
        at = jnp.maximum(part, 0)[..., None, None]
        heads.append([*(jnp.take_along_axis(x, at, axis=2)[:, :, 0] for x in own), part])
    return Begun(*(jnp.concatenate(x, axis=1) for x in zip(*heads, strict=True)))


def _means(keys: Rows, mass: Float[Array, "B R"], slots: tuple[int, ...], shape: Shape) -> Array:
    """Returns the mean key of each part, inf for none."""
    heads = []
    for run in cache.runs(slots):
        room = -run.size % shape.leaf
        key = jnp.pad(cache.view(keys, run), ((0, 0), (0, 0), (0, room), (0, 0))).astype(jnp.float32)
        alive = jnp.pad(cache.view(mass, run), ((0, 0), (0, 0), (0, room))) > 0
        parts = (len(keys), -1, shape.box)
        key, alive = key.reshape(*parts, key.shape[-1]), alive.reshape(*parts, 1)
        n = alive.sum(2)
        mean = jnp.where(alive, key, 0.0).sum(2) / jnp.maximum(n, 1)
        heads.append(jnp.where(n > 0, mean, jnp.inf))
    return jnp.concatenate(heads, axis=1).astype(keys.dtype)


def refresh(
    tree: Tree, keys: Float[Array, "B K T D"], idx: Int[Array, "B K T"], mass: Float[Array, "B R"],
    slots: tuple[int, ...], shape: Shape,
) -> Tree:  # fmt: skip
    """Returns the tree after new keys came to neighbouring slots that were free, without reading others.

    Args:
        keys: as queries will meet them (rotated).
        idx: the packed row of each key; R = none.
        mass: of all slots, the new ones included.

    Cost: a part and a root are read and written per token, for a root all of its parts are read.
    """
    here = idx < mass.shape[1]
    slot = jnp.where(here, idx - jnp.asarray(cache.starts(slots))[:, None], 0)  # [B K T]
    starts = jnp.asarray(cache.starts(shape.n_parts(slots)))[:, None]
    part = jnp.where(here, slot // shape.box + starts, sum(shape.n_parts(slots)))
    if shape.known_by == "middle":
        tree = _moved_middles(tree, keys, (here, slot), slots, shape)
    elif shape.known_by == "mean":
        tree = tree.replace(low=_moved_means(tree.low, keys, (idx, slot, part), mass, (slots, shape)))
    else:
        b, keys = jnp.arange(len(idx))[:, None, None], keys.astype(tree.low.dtype)
        low, high = tree.low.at[b, part].min(keys, mode="drop"), tree.high.at[b, part].max(keys, mode="drop")
        tree = tree.replace(low=low, high=high)
    return tree if shape.root is None else _with_roots(tree, here, slot, slots, shape)


def _moved_means(
    means: Array, keys: Array, at: tuple[Array, Array, Array], mass: Array, how: tuple[tuple[int, ...], Shape]
) -> Array:
    """Adds keys to the means of their parts.

    at: packed row, slot of the head, and part of each key.
    """
    (idx, slot, part), (slots, shape) = at, how
    size, offset = shape.box, (slot % shape.box)[..., None]
    rows = (idx[..., None] - offset) + jnp.arange(size)  # [B K T P], those of the part
    inside = (slot[..., None] - offset) + jnp.arange(size) < jnp.asarray(slots)[:, None, None]
    rows = jnp.where(inside & (part < means.shape[1])[..., None], rows, -1)
    n = (cache.take(mass, rows.reshape(len(rows), -1)).reshape(rows.shape) > 0).sum(-1, keepdims=True)
    b = jnp.arange(len(idx))[:, None, None]
    old = means[b, jnp.minimum(part, means.shape[1] - 1)].astype(jnp.float32)
    old = jnp.where(old == jnp.inf, 0.0, old)
    step = (keys.astype(jnp.float32) - old) / jnp.maximum(n, 1)
    wide = means if idx.shape[2] == 1 else means.astype(jnp.float32)
    if idx.shape[2] == 1:
        return wide.at[b, part].set((old + step).astype(means.dtype), mode="drop")
    return wide.at[b, part].set(old, mode="drop").at[b, part].add(step, mode="drop").astype(means.dtype)


def _moved_middles(
    tree: Tree, keys: Array, at: tuple[Array, Array], slots: tuple[int, ...], shape: Shape
) -> Tree:
    """Takes keys into the boxes of the parts that they lie in, and moves their middles.

    at: whether there is such a key, and its slot of the head.
    """
    (here, slot), begun = at, tree.begun
    n = (slot.shape[2] + shape.box - 2) // shape.box + 1  # neighbouring slots touch no more
    part = slot // shape.box
    first = jnp.where(here, part, max(slots)).min(2)  # [B K]
    b, h = jnp.arange(len(slot))[:, None, None], jnp.arange(len(slots))[:, None]
    at = jnp.where(here, part - first[..., None], n)
    none = jnp.full((*first.shape, n, keys.shape[3]), jnp.inf, begun.low.dtype)
    low = none.at[b, h, at].min(keys.astype(none.dtype), mode="drop")
    high = (-none).at[b, h, at].max(keys.astype(none.dtype), mode="drop")
    same = (begun.part == first)[..., None]
    low = low.at[:, :, 0].min(jnp.where(same, begun.low, jnp.inf))
    high = high.at[:, :, 0].max(jnp.where(same, begun.high, -jnp.inf))
    place = first[..., None] + jnp.arange(n) + jnp.asarray(cache.starts(shape.n_parts(slots)))[:, None]
    place = jnp.where(low[..., 0] <= high[..., 0], place, sum(shape.n_parts(slots)))
    last = jnp.where(here, at, -1).max(2)
    written, take = last >= 0, jnp.maximum(last, 0)[..., None, None]
    ends = [
        jnp.where(written[..., None], jnp.take_along_axis(x, take, axis=2)[:, :, 0], old)
        for x, old in ((low, begun.low), (high, begun.high))
    ]
    begun = Begun(*ends, jnp.where(written, first + last, begun.part))
    moved = jax.tree.map(
        lambda x, new: x.at[b, place].set(new, mode="drop"), tree.low, _middles(low, high, shape)
    )
    return tree.replace(low=moved, begun=begun)


def _with_roots(
    tree: Tree, here: Bool[Array, "B K T"], slot: Array, slots: tuple[int, ...], shape: Shape
) -> Tree:
    """Makes the boxes of the written roots anew, from those of their parts."""
    first = jnp.where(here, slot, max(slots)).min(2, keepdims=True)  # [B K 1]
    last = jnp.where(here, slot, -1).max(2, keepdims=True) // shape.root
    n = (slot.shape[2] + shape.root - 2) // shape.root + 1  # neighbouring slots touch no more
    root = first // shape.root + jnp.arange(n)
    low, high, row = tree.root_low, tree.root_high, 0
    n_roots, b = shape.n_roots(slots), jnp.arange(len(slot))[:, None, None]
    for run in cache.runs(shape.n_parts(slots)):
        heads, size = slice(run.head, run.head + run.n), n_roots[run.head]
        mine = root[:, heads]
        boxes = _root_boxes(tree, jnp.minimum(mine, size - 1), run, shape)
        place = mine + row + jnp.arange(run.n)[:, None] * size
        place = jnp.where((mine < size) & (mine <= last[:, heads]), place, low.shape[1])
        low, high = (x.at[b, place].set(y, mode="drop") for x, y in zip((low, high), boxes, strict=True))
        row += run.n * size
    return tree.replace(root_low=low, root_high=high)


def _root_boxes(tree: Tree, root: Int[Array, "B n M"], run: cache.Run, shape: Shape) -> tuple[Array, Array]:
    """Returns the boxes [B n M D] of roots of a run's heads.

    run: of parts.
    """
    part = root[..., None] * (shape.children * shape.pairs) + jnp.arange(shape.children * shape.pairs)
    inside = (part < run.size)[..., None]
    rows = jnp.minimum(part, run.size - 1).reshape(*root.shape[:2], -1, 1)
    taken = [
        jnp.take_along_axis(cache.view(x, run), rows, axis=2).reshape(*part.shape, -1)
        for x in (tree.low, tree.low if tree.high is None else tree.high)
    ]
    if tree.high is None:  # a part without keys has inf
        taken[1] = jnp.where(taken[1] == jnp.inf, -jnp.inf, taken[1])
    low, high = (jnp.where(inside, x, y) for x, y in zip(taken, (jnp.inf, -jnp.inf), strict=True))
    return low.min(3), high.max(3)
