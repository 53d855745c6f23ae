"""LeoAM: keeps everything, on up to three tiers, and reads at each step the chunks that can matter.

A chunk of neighbouring tokens, a leaf, is known by an abstract: the smallest and largest of its keys per
channel, which bound q·k for any query, or the middle between them, which catches more for its bytes. Leaves
may lie in larger chunks, roots, known by smallest and largest too: one evaluation may tell that none of a
root's tokens matter. A step looks into roots in the order of their bounds.

    U(q)    = Σ_d max(q_d·low_d, q_d·high_d)        of a root, and of a leaf; or q·middle, of a leaf
    read      the leaves of largest U, as many as hold `topk` tokens, and those of the newest `window` and of
              the first `n_sinks` tokens; query heads of a KV head share them, ranked by the group's largest U
    attend    exactly, over these

State: a vector [D] per leaf, half of 1/leaf of the bytes of K and V, two with boxes; with `pairs`, so many
per leaf; two per root; as codes (`abstract_bits`) a byte a channel. Holds the whole cache: on the device it
saves reads, not memory; on host and disk, both. Prompts are read in full. After a method that evicts without
moving slots, abstracts keep what is gone, and the window is that of the last slots.

Source: arXiv 2506.20187: chunks in a tree by each layer's skew, a light abstract of each, K and V on device,
host and disk. The paper gives no formulas; bounds, parts of a leaf (`pairs`), means or middles instead of
boxes (`known_by`), codes, window and sinks are our reconstruction. Deviations: what is read is what an
evaluation of all leaves would choose, the tree only saves evaluations; no root is taken whole; sizes are a
layer's, found beforehand (`kvjax.calibrate.chunks`), and do not change while decoding.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax import cache, chunk_search, chunk_tree, far_tree, storage, tiers
from kvjax.attend import Selection
from kvjax.cache import KV, Layer
from kvjax.chunk_files import Layout
from kvjax.chunk_tree import Shape, Tree
from kvjax.disk import Remote
from kvjax.far_tree import FarTree
from kvjax.method import CacheMethod
from kvjax.rope import rotate
from kvjax.shapes import Positions, Queries, Slots, Tokens

__all__ = ["LeoAM"]

PerLayer = Any  # a setting, or anything array-like of one per layer, which becomes a tuple
_PER_LAYER = {"leaf": int, "root": int, "known_by": str}
_TIERS = ("device", "host", "disk")
_CHUNK = 32  # tokens of a chunk at least


@dataclass(frozen=True)
class LeoAM(CacheMethod):
    """Reads `topk` tokens of each KV head and step, in leaves.

    aux: `Tree`, `FarTree` where abstracts lie on the host, none in layers read in full.

    Args:
        topk: tokens, or a share of those seen; None reads all, which is what the first layers may do.
        leaf: tokens that are read together, or one number per layer.
        root: tokens of a root, a multiple of leaf, or one number per layer; None evaluates all leaves,
            which is as much work on real models, and no loop.
        pairs: parts of a leaf, each with an abstract.
        known_by: what an abstract is, the "box" of its keys, their "mean", or the "middle" of the box; or one
            for each layer.
        abstract_bits: 8 for middles as codes with a scale each, without roots and on the device; None for
            abstracts in the type of the keys.
        window: newest tokens that are always read.
        n_sinks: first tokens that are always read.
        dense_layers: first layers that are read in full.
        tier: where K and V of the other layers lie, "device", "host" or "disk".
        abstracts: where abstracts lie, "device", or "host", which K and V are off the device for: then every
            step has them copied, a layer at a time.
        device_budget: K and V off the device, bytes that it holds of the state from step to step, an equal
            part for each layer; layers that are read in full, or have a window, take what they take. None
            for twice the K and V that a step may read.
        host_budget: with a disk, bytes of K and V that the host holds; None for all.
        disk: a folder, of one state; giving it makes the tier "disk".
        chunk: tokens of a KV head that the disk writes and reads together, a multiple of leaf; None for the
            least that has 32, since what a chunk has beside the leaf that is asked for is read for nothing.
        ahead: have what the next layer may ask for read from the disk while this one computes.
        int4: let a share of the chunks come from the disk in 4 bits, as many as keep it from being late.
    """

    topk: int | float | None = 0.1
    leaf: PerLayer = 16
    root: PerLayer = None
    pairs: int = 1
    known_by: PerLayer = "middle"
    abstract_bits: int | None = None
    window: int = 64
    n_sinks: int = 16
    dense_layers: int = 0
    tier: str = "device"
    abstracts: str = "device"
    device_budget: int | None = field(default=None, repr=False)  # what a context is opened with may differ
    host_budget: int | None = field(default=None, repr=False)
    disk: str | None = field(default=None, repr=False, compare=False)
    chunk: int | None = None
    ahead: bool = field(default=True, repr=False)
    int4: bool = False
    evicts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Makes tables hashable. Raises ValueError for settings out of range."""
        super().__post_init__()
        for name, kind in _PER_LAYER.items():
            if isinstance(value := getattr(self, name), list | tuple | np.ndarray):
                row = tuple(None if x is None else kind(x) for x in value)
                object.__setattr__(self, name, row)
            elif type(value) is not kind and not (name == "root" and value is None):
                what = "a word" if kind is str else "a whole number"
                raise ValueError(f"{name} is {what}, or one for each layer, got {value!r}")
        if self.disk is not None:
            object.__setattr__(self, "tier", "disk")
        if self.disk == "" or (self.chunk is not None and self.chunk < 1):
            raise ValueError(
                f"a disk is a folder, in chunks of 1 token or more, got {self.disk=}, {self.chunk=}"
            )
        share = isinstance(self.topk, float)
        if self.topk is not None and not (0 < self.topk <= 1 if share else self.topk >= 1):
            raise ValueError(f"topk is tokens, 1 or more, or a share, above 0 to 1.0, got {self.topk=}")
        if self.window < 1 or min(self.n_sinks, self.dense_layers) < 0:
            raise ValueError(
                "window is at least 1, n_sinks and dense_layers at least 0, got "
                f"{self.window=}, {self.n_sinks=}, {self.dense_layers=}"
            )
        for leaf, root, known_by in self._table():
            Shape(leaf, root, self.pairs, known_by, self.abstract_bits)
            if self.abstracts == "host" and (root, self.abstract_bits) != (None, None):
                raise ValueError(
                    "roots, and abstracts as codes, need abstracts on the device, got "
                    f"{self.abstracts=} for {root=}, {self.abstract_bits=}"
                )
            if self.disk is not None and self.chunk is not None and self.chunk % leaf:
                raise ValueError(f"a chunk holds whole leaves, got {self.chunk=} for {leaf=}")
        self._check_tiers()

    def _table(self) -> list[tuple[int, int | None, str]]:
        """Returns leaf, root and known_by of each layer, one row where layers are alike."""
        given = {name: getattr(self, name) for name in _PER_LAYER}
        lengths = {len(x) for x in given.values() if isinstance(x, tuple)}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"leaf, root and known_by have one entry per layer, got {given}")
        n = max(lengths, default=1)
        return list(zip(*(x if isinstance(x, tuple) else (x,) * n for x in given.values()), strict=True))

    def _check_tiers(self) -> None:
        if self.tier not in _TIERS or (self.tier == "disk") != (self.disk is not None):
            raise ValueError(
                'K and V lie on the "device", the "host", or a "disk" with its folder, got '
                f"{self.tier=}, {self.disk=}"
            )
        if self.abstracts not in _TIERS[:2] or (self.abstracts == "host" and self.tier == "device"):
            raise ValueError(
                'abstracts lie on the "device", or on the "host" if K and V are not on the device, got '
                f"{self.abstracts=}, {self.tier=}"
            )
        given = {name: getattr(self, name) for name in ("device_budget", "host_budget")}
        if any(x is not None and x < 1 for x in given.values()):
            raise ValueError(f"budgets are bytes, 1 or more, or None, got {given}")
        if (self.device_budget and self.tier == "device") or (self.host_budget and self.tier != "disk"):
            raise ValueError(
                "device_budget is for K and V on the host or the disk, host_budget for the disk, got "
                f"{given} for {self.tier=}: leave it out, or take another tier"
            )

    @property
    def folder(self) -> str | None:  # type: ignore[override]
        """The disk's folder."""
        return self.disk

    @property
    def shape(self) -> Shape:
        """How the slots of a layer lie in its tree."""
        return Shape(self.leaf, self.root, self.pairs, self.known_by, self.abstract_bits)

    def for_layer(self, index: int, n_layers: int) -> "LeoAM":
        """Returns the method of one layer: its chunks, and its part of the device's bytes.

        Raises:
            ValueError: for tables with another number of entries than the model has layers.
        """
        if index < self.dense_layers:
            return LeoAM(topk=None)
        table = self._table()
        alike = not any(isinstance(getattr(self, name), tuple) for name in _PER_LAYER)
        if not alike and len(table) != n_layers:
            raise ValueError(f"a table has one entry per layer, got {len(table)} for {n_layers=}")
        leaf, root, known_by = table[0 if alike else index]
        budgets = {name: getattr(self, name) for name in ("device_budget", "host_budget")}
        budgets = {name: x and max(1, x // n_layers) for name, x in budgets.items()}
        return replace(self, leaf=leaf, root=root, known_by=known_by, dense_layers=0, **budgets)

    def init(self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any) -> KV:
        """Returns an empty state.

        Raises:
            ValueError: for more tokens to read than a head holds, or fewer bytes on the device than a step
                may read.
        """
        if isinstance(self.topk, int) and self.topk > max(slots):
            raise ValueError(f"topk is at most the slots of a head, {max(slots)}, got {self.topk=}: lower it")
        away = self.tier != "device" and self.topk is not None
        host = self._host(layer, batch, slots, dtype) if away else None
        return self._empty(layer, batch, slots, dtype, host)

    def _empty(
        self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any, host: tiers.Host | None
    ) -> KV:
        """Returns an empty state that lies there."""
        kv = cache.allocate(layer, batch, slots, dtype, rotated=self.rotated, host=host)
        if self.topk is None:
            return kv
        tree = chunk_tree.empty(batch, layer.head_dim, dtype, kv.slots, self.shape)
        return kv.replace(aux=self.placed(tree, kv.fill, kv.slots))

    def placed(self, tree: Tree, end: Int[Array, "B K"], slots: tuple[int, ...]) -> Tree | FarTree:
        """Returns the tree where abstracts lie."""
        if self.abstracts == "device":
            return tree
        return far_tree.put(tree, end, slots, self.shape, tiers.STEPS)

    def _host(self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any) -> tiers.Host:
        """Returns how a layer lies on the host."""
        n_leaves = max(self.shape.n_leaves(slots))
        needed = min(self._count(max(slots)) + self._n_forced, n_leaves)
        remote = self._remote(layer, batch, slots, dtype) if self.tier == "disk" else None
        how = functools.partial(tiers.Host, block=self.leaf, remote=remote)
        beside, least = (self._device_bytes(layer, batch, slots, dtype, how(n)) for n in (0, needed))
        line_bytes = (least - beside) // needed  # of a line of each head
        lines = 2 * needed if self.device_budget is None else (self.device_budget - beside) // line_bytes
        if lines < needed:
            raise ValueError(
                "the device holds abstracts, positions, masses and what a step may read, "
                f"{least} bytes of a layer, got {self.device_budget}: raise device_budget to as much for "
                "each of the model's layers, or lower topk"
            )
        return how(min(lines, n_leaves))

    def _device_bytes(
        self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any, how: tiers.Host
    ) -> int:
        """Returns the bytes of a state on the device."""
        kv = jax.eval_shape(lambda: self._empty(layer, batch, slots, dtype, how))
        aux = (kv.aux.new, kv.aux.first) if isinstance(kv.aux, FarTree) else kv.aux
        here = kv.replace(aux=aux, tier=kv.tier.replace(far=None))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(here))

    def _remote(self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any) -> Remote:
        """Returns how a layer lies on the disk."""
        chunk = self.chunk or -(-_CHUNK // self.leaf) * self.leaf
        layout = Layout(batch, layer.n_kv_heads, max(slots), layer.head_dim, dtype, chunk)
        least = batch * layer.n_kv_heads * layout.stride
        if self.host_budget is not None and self.host_budget < least:
            raise ValueError(
                f"the host holds a chunk of each KV head and row, {least} bytes of a layer, got "
                f"{self.host_budget}: raise host_budget to as much for each of the model's layers"
            )
        return Remote(jnp.int32(-1), chunk, self.host_budget, self.int4, self.ahead)

    @property
    def _n_forced(self) -> int:
        """Leaves that a step always reads, at most."""
        return (self.window + self.leaf - 2) // self.leaf + 1 + -(-self.n_sinks // self.leaf)

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Brings the new keys into the abstracts of their chunks; no other key is read."""
        if self.topk is None:
            return kv
        keys = rotate(k, jnp.broadcast_to(pos[:, :, None], k.shape[:3]), kv.layer.rope)
        keys = jnp.swapaxes(keys, 1, 2)
        refresh = far_tree.refresh if isinstance(kv.aux, FarTree) else chunk_tree.refresh
        return kv.replace(aux=refresh(kv.aux, keys, idx, kv.mass, kv.slots, self.shape))

    def settled(self, kv: KV, room: int) -> KV:
        """Moves the abstracts of full leaves to the host, where they lie there."""
        if not isinstance(kv.aux, FarTree):
            return kv
        return kv.replace(aux=far_tree.settled(kv.aux, kv.fill, room, kv.slots, self.shape))

    def moved(self, kv: KV, idx: jax.Array | None) -> KV:
        """Makes the tree anew."""
        if self.topk is None or kv.tier is not None:
            return kv
        tree = chunk_tree.build(storage.read(kv.k), kv.mass, kv.slots, self.shape)
        return kv.replace(aux=self.placed(tree, kv.fill, kv.slots))

    def select(self, kv: KV, q: Queries, pos: Positions) -> Selection | None:
        """Returns the leaves that this query reads; prompts (T > 1) read all."""
        if self.topk is None or q.shape[1] > 1:
            return None
        return Selection(idx=self.search(kv, q, pos)[0], block=self.leaf)

    def search(self, kv: KV, q: Queries, pos: Positions) -> tuple[Int[Array, "B K N"], Int[Array, "B K"]]:
        """Returns the leaves that a decode step's query reads, and how many chunks were evaluated."""
        q = rotate(q, jnp.broadcast_to(pos[:, :, None, None], q.shape[:4]), kv.layer.rope)[:, 0]
        n, forced = self._count(max(kv.slots)), self._forced(kv)
        count = None if isinstance(self.topk, int) else jnp.minimum(self._count(kv.seen), n)
        tree = kv.aux
        if isinstance(tree, FarTree):
            tree, q = far_tree.near(tree, q, kv.slots, self.shape)
        return chunk_search.best(tree, q, forced, n, kv.slots, self.shape, count)

    def _forced(self, kv: KV) -> Int[Array, "B K F"]:
        """Returns the leaves of the newest tokens and of the first; -1 = none."""
        fill = kv.fill[..., None]
        newest = (fill - 1) // self.leaf - jnp.arange((self.window + self.leaf - 2) // self.leaf + 1)
        newest = jnp.where(newest >= jnp.maximum(fill - self.window, 0) // self.leaf, newest, -1)
        first = jnp.arange(-(-self.n_sinks // self.leaf))
        return jnp.concatenate([newest, jnp.where(first * self.leaf < fill, first, -1)], axis=2)

    def _count(self, seen: Any) -> Any:
        """Returns how many leaves are chosen of `seen` tokens, at least one: those of `topk` tokens."""
        if isinstance(self.topk, int):
            return -(-self.topk // self.leaf)
        if isinstance(seen, int):
            return max(1, math.ceil(self.topk * seen / self.leaf))
        return jnp.maximum(1, jnp.ceil(self.topk * seen / self.leaf).astype(jnp.int32))
