"""The protocol of KV-cache methods: four pure verbs on a KV state, with dense defaults.

    init       an empty state
    observe    new tokens were written: refresh the method's own index
    compress   evict or merge down to the budget; after the prompt (or each chunk) and each decode step
    select     which slots this query reads, None = all

The cache writes tokens itself (`cache.append`); a method never does, which is what lets methods
compose. Every verb sees queries un-rotated, `[B T K G D]`, with their positions, -1 = padding.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Bool

from kvjax import cache
from kvjax.attend import Selection
from kvjax.cache import KV, Layer
from kvjax.shapes import Positions, Queries, Slots, Tokens

__all__ = ["Budget", "CacheMethod", "Chain", "chain"]

Budget = Any  # an int or anything array-like [L, K]; kept as an int or nested tuples


class CacheMethod(abc.ABC):
    """A way to hold fewer bytes of KV cache, or to read fewer. Subclasses are frozen dataclasses.

    A field `budget`, where there is one, is the number of tokens per KV head, generated ones
    included: an int, or a table [L, K]; anything array-like becomes nested tuples.

    Example:
        >>> from kvjax import eviction
        >>> @dataclasses.dataclass(frozen=True)
        ... class Newest(CacheMethod):
        ...     budget: Budget
        ...     evicts: ClassVar[bool] = True
        ...
        ...     def compress(self, kv, q, pos):
        ...         return eviction.by_score(kv, kv.pos.astype(float), self.budgets(kv.layer))[0]
        >>> import kvjax
        >>> model = kvjax.load("smollm2-135m")
        >>> ids = kvjax.pad([model.tokenizer.encode("The capital of France is")])
        >>> _, state = kvjax.prefill(model, ids, Newest(budget=4), room=2)
        >>> state[0].slots  # of each KV head; one is free for the next token
        (4, 4, 4)
    """

    rotated: ClassVar[bool] = True  # keys are stored rotated
    evicts: ClassVar[bool] = False  # compress removes or moves slots
    n_free: ClassVar[int] = 1  # slots of a budget that compress leaves free, at most
    stays: ClassVar[str] = "a token and a free slot"  # what a budget holds at least, see `least`
    couples_heads: ClassVar[bool] = False  # a verb looks at several KV heads of a layer together
    tier: ClassVar[str] = "device"  # where K and V lie; others than this are for slots of one token each
    folder: ClassVar[str | None] = None  # of the tier "disk"
    budget: Budget | None

    @property
    def n_queries(self) -> int:
        """How many of the newest queries `compress` looks at after a prompt, W."""
        return 1

    @property
    def least(self) -> int:
        """Slots that a head's budget has at least."""
        return self.n_free + 1

    @property
    def learnt(self) -> Any:
        """What `init` takes beside the settings that are compared; hashable, None for nothing."""
        return None

    def __post_init__(self) -> None:
        """Makes the budget hashable and checks it.

        Raises:
            ValueError: for a budget below 1, or of another shape than [L, K].
        """
        if getattr(self, "budget", None) is not None:
            object.__setattr__(self, "budget", _as_budget(self.budget))

    def for_layer(self, index: int, n_layers: int) -> "CacheMethod":
        """Returns the method of one layer: a budget table gives its row.

        Raises:
            ValueError: for a table with another number of rows than the model has layers.
        """
        table = getattr(self, "budget", None)
        if isinstance(table, tuple):
            if len(table) != n_layers:
                raise ValueError(f"a budget table has one row per layer, got {len(table)} for {n_layers=}")
            return dataclasses.replace(self, budget=table[index])
        return self

    def for_heads(self, n: int) -> "CacheMethod":
        """Returns the method of n of a layer's KV heads, which are alike.

        Raises:
            ValueError: for a row of unequal budgets.
        """
        row = getattr(self, "budget", None)
        if not isinstance(row, tuple):
            return self
        if len(set(row)) != 1:
            raise ValueError(
                f"heads that lie on different devices have equal budgets, got {row}: "
                "give one budget per layer, or use one device"
            )
        return dataclasses.replace(self, budget=row[:n])

    def slots(self, layer: Layer, total: int) -> tuple[int, ...]:
        """Returns the capacity per KV head that serves `total` tokens: the budget if it evicts."""
        if not self.evicts:
            return (total,) * layer.n_kv_heads
        return tuple(min(b, total) for b in self.budgets(layer))

    def budgets(self, layer: Layer) -> tuple[int, ...]:
        """Returns the budget of each KV head of a layer.

        Raises:
            ValueError: for a row of another length than the layer's KV heads, or with too few slots.
        """
        budget = self.budget
        row = (budget,) * layer.n_kv_heads if isinstance(budget, int) else budget
        if len(row) != layer.n_kv_heads or not isinstance(row[0], int):
            n_heads = layer.n_kv_heads
            raise ValueError(f"a layer's budget has one entry per KV head, got {budget=} for {n_heads=}")
        if self.evicts and min(row) < self.least:
            raise ValueError(
                f"a budget holds {self.stays}, {self.least} slots, got {min(row)}: raise the budget"
            )
        return row

    def init(self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any) -> KV:
        """Returns an empty state with `slots` per KV head."""
        return self.moved(cache.allocate(layer, batch, slots, dtype, rotated=self.rotated), None)

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Refreshes the index after tokens were written to packed rows idx (R = dropped).

        k: their keys before the rotation.
        """
        return kv

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Brings the state down to the budget, given the queries of this call, the newest last."""
        return kv

    def due(self, kv: KV) -> Bool[Array, "B K"] | None:
        """Returns whose slots `compress` has work with after a decode step; None = it runs in every step.

        A method that has work seldom says so here: the step asks once for all layers, after the last.
        """
        return None

    def select(self, kv: KV, q: Queries, pos: Positions) -> Selection | None:
        """Returns what these queries read, None = every slot."""
        return None

    def settled(self, kv: KV, room: int) -> KV:
        """Moves what the method keeps off the device, between programs; the next takes `room` tokens at most.

        Runs outside of programs, after rows were moved. The given state is consumed.
        """
        return kv

    def moved(self, kv: KV, idx: jax.Array | None) -> KV:
        """Refreshes the index after slots moved: idx holds the old packed rows, -1 = new.

        idx is None for an empty state, and where an earlier method of a chain moved the slots.
        The default carries per-slot arrays along.
        """
        if kv.aux is None or idx is None:
            return kv
        return kv.replace(aux=jax.tree.map(lambda x: cache.take(x, idx), kv.aux))


def _as_budget(budget: Any) -> Budget:
    """Returns an int, a row or a table of ints."""
    numbers = np.asarray(budget)
    if numbers.ndim > 2 or numbers.dtype.kind not in "iu" or numbers.size == 0:
        raise ValueError(f"a budget is an int or a table [L, K] of ints, got {budget=}")
    if numbers.min() < 1:
        raise ValueError(f"a budget is at least 1 token per KV head, got {budget=}")
    if numbers.ndim == 0:
        return int(numbers)
    rows = numbers.tolist()
    return tuple(rows) if numbers.ndim == 1 else tuple(tuple(row) for row in rows)


@dataclasses.dataclass(frozen=True)
class Chain(CacheMethod):
    """Several methods on one state; only the first may evict. Made by `chain`."""

    methods: tuple[CacheMethod, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where the methods cannot share a state."""
        late = [type(m).__name__ for m in self.methods[1:] if m.evicts]
        if late:
            raise ValueError(f"only the first method of a chain may evict, got {late} later: put it first")
        if any(m.tier != "device" for m in self.methods):
            raise ValueError('a method of a chain keeps K and V on the device: take tier="device"')
        if len({m.rotated for m in self.methods}) > 1:
            raise ValueError("methods of a chain store keys alike, got rotated and un-rotated ones")

    @property
    def rotated(self) -> bool:  # type: ignore[override]
        """Whether keys are stored rotated."""
        return self.methods[0].rotated

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        """Whether the first method evicts."""
        return self.methods[0].evicts

    @property
    def n_free(self) -> int:
        """What the first method leaves free."""
        return self.methods[0].n_free

    @property
    def least(self) -> int:
        """What the first method needs."""
        return self.methods[0].least

    @property
    def couples_heads(self) -> bool:  # type: ignore[override]
        """Whether one of the methods does."""
        return any(m.couples_heads for m in self.methods)

    @property
    def n_queries(self) -> int:
        """The largest W of the methods."""
        return max(m.n_queries for m in self.methods)

    @property
    def learnt(self) -> Any:
        """What the methods' do, in order."""
        return tuple(m.learnt for m in self.methods)

    def for_layer(self, index: int, n_layers: int) -> "Chain":
        """Returns the chain of one layer."""
        return Chain(tuple(m.for_layer(index, n_layers) for m in self.methods))

    def for_heads(self, n: int) -> "Chain":
        """Returns the chain of n neighbouring KV heads."""
        return Chain(tuple(m.for_heads(n) for m in self.methods))

    def budgets(self, layer: Layer) -> tuple[int, ...]:
        """Returns the first method's budget."""
        return self.methods[0].budgets(layer)

    def init(self, layer: Layer, batch: int, slots: Sequence[int], dtype: Any) -> KV:
        """Returns an empty state; aux is one index per method."""
        states = [m.init(layer, batch, slots, dtype) for m in self.methods]
        return states[0].replace(aux=tuple(kv.aux for kv in states))

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Lets every method refresh its index."""
        return self._each(kv, lambda m, part: m.observe(part, q, k, pos, idx))

    def due(self, kv: KV) -> Bool[Array, "B K"] | None:
        """Returns where the first method has work; the others compress with it."""
        return self.methods[0].due(kv)

    def compress(self, kv: KV, q: Queries, pos: Positions) -> KV:
        """Compresses in order; methods after an eviction make their index anew."""
        before, late = kv.slots, self.due(kv) is not None

        def one(m: CacheMethod, part: KV) -> KV:
            if m is not self.methods[0] and (late or part.slots != before):
                part = m.moved(part, None)
            return m.compress(part, q, pos)

        return self._each(kv, one)

    def select(self, kv: KV, q: Queries, pos: Positions) -> Selection | None:
        """Returns the last selection that any method makes."""
        found = [m.select(kv.replace(aux=a), q, pos) for m, a in zip(self.methods, kv.aux, strict=True)]
        return next((s for s in reversed(found) if s is not None), None)

    def moved(self, kv: KV, idx: jax.Array | None) -> KV:
        """Lets every method refresh its index."""
        return self._each(kv, lambda m, part: m.moved(part, idx))

    def _each(self, kv: KV, step: Any) -> KV:
        """Runs a verb of every method on the shared state, each with its own aux."""
        aux = []
        for m, a in zip(self.methods, kv.aux, strict=True):
            kv = step(m, kv.replace(aux=a))
            aux.append(kv.aux)
        return kv.replace(aux=tuple(aux))


def chain(*methods: CacheMethod) -> CacheMethod:
    """Composes methods on one state.

    Raises:
        ValueError: for no method; where one after the first evicts, or keys are stored differently.

    Example:
        >>> from kvjax import METHODS
        >>> chain(METHODS["tova"](budget=512), METHODS["kivi"](bits=4)).methods
        (TOVA(budget=512), KIVI(bits=4, block=32, window=32))
    """
    flat = tuple(inner for m in methods for inner in (m.methods if isinstance(m, Chain) else (m,)))
    if not flat:
        raise ValueError("a chain has at least one method, got none")
    return flat[0] if len(flat) == 1 else Chain(flat)
