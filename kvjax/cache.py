"""Holds the KV state of one layer: one frozen pytree of packed slots, and the operations on it.

Heads lie one after the other on the packed axis R = ΣS, so each KV head may have a capacity of
its own and memory is the sum. `mass` is what a slot stands for: 0 nothing, 1 a token, n a merged
cluster of n tokens; attention adds log(mass) to its logits, so validity, ragged lengths and
centroid weights are one field. `pos` is the slot's rotary position: a slot is not a position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from kvjax import storage, tiers
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.rope import angles
from kvjax.shapes import Leaf, Packed, Positions, Queries, Slots, Tokens
from pallas_kernels import Turn, append_rows, attention, select_topk
from pallas_kernels.backend import debug_check

__all__ = [
    "KV",
    "Layer",
    "Run",
    "allocate",
    "append",
    "count",
    "enter",
    "extent",
    "keep",
    "runs",
    "starts",
    "take",
    "view",
    "when",
    "widen",
]


@dataclass(frozen=True)
class Layer:
    """What attention of one layer needs to know; equal layers compile once.

    window: tokens a query sees including itself, None for all.
    """

    n_kv_heads: int
    group: int
    head_dim: int
    rope: RopeConfig
    scale: float
    softcap: float | None = None
    window: int | None = None

    @classmethod
    def of(cls, config: ModelConfig, index: int) -> "Layer":
        """Takes the settings of layer `index` from a model's configuration."""
        return cls(
            n_kv_heads=config.n_kv_heads,
            group=config.group,
            head_dim=config.head_dim,
            rope=config.rope_of(index),
            scale=config.query_scale,
            softcap=config.attn_softcap,
            window=config.layer_windows[index],
        )


@struct.dataclass
class KV:
    """KV state of one layer. Arrays are leaves, the rest is static."""

    k: Leaf  # [B R D], or a quantised store; None where the tier has it
    v: Leaf  # as k
    pos: Leaf  # [B R] int32, rotary position of the slot
    mass: Leaf  # [B R] float32, tokens the slot stands for
    fill: Leaf  # [B K] int32, next free slot of the head
    seen: Leaf  # [B] int32, tokens consumed
    aux: Leaf  # the method's own index
    tier: Leaf  # keys and values on the host, with what the device holds of them; None where k and v are
    layer: Layer = struct.field(pytree_node=False)
    slots: tuple[int, ...] = struct.field(pytree_node=False)  # [K] capacity of each head
    rotated: bool = struct.field(pytree_node=False)  # keys are stored rotated by pos

    @property
    def rows(self) -> Any:
        """Keys and values where they lie: k and v, or the tier's rows on the host."""
        return (self.k, self.v) if self.tier is None else self.tier.far


class Run(NamedTuple):
    """Neighbouring heads of equal capacity: they share one dense view."""

    head: int  # first KV head
    n: int  # heads
    row: int  # first packed row
    size: int  # slots per head


def runs(slots: Sequence[int], *more: Sequence[Any]) -> list[Run]:
    """Splits the heads into runs of equal capacity (and of equal values in `more`)."""
    keys = list(zip(slots, *more, strict=True))
    found, row = [], 0
    for head, key in enumerate(keys):
        if head and key == keys[head - 1]:
            found[-1] = found[-1]._replace(n=found[-1].n + 1)
        else:
            found.append(Run(head, 1, row, slots[head]))
        row += slots[head]
    return found


def starts(slots: Sequence[int]) -> np.ndarray:
    """Returns the first packed row of each head, [K]."""
    return np.concatenate([[0], np.cumsum(slots)[:-1]]).astype(np.int32)


def view(x: Array | np.ndarray, run: Run) -> Array | np.ndarray:
    """Views the packed rows of a run as [B n S ...]."""
    rows = x[:, run.row : run.row + run.n * run.size]
    return rows.reshape(x.shape[0], run.n, run.size, *x.shape[2:])


def allocate(
    layer: Layer, batch: int, slots: Sequence[int], dtype: Any, *,
    rotated: bool = True, host: tiers.Host | None = None,
) -> KV:  # fmt: skip
    """Makes an empty state with the given capacity per KV head, in host memory if that is asked for.

    Raises:
        ValueError: where there is not one positive capacity per KV head.
    """
    slots = tuple(int(s) for s in slots)
    if len(slots) != layer.n_kv_heads or min(slots) < 1:
        raise ValueError(
            f"a layer has one capacity of at least 1 per KV head, got {slots=} for {layer.n_kv_heads=}"
        )
    rows, size = sum(slots), layer.head_dim
    here = lambda: jnp.zeros((batch, rows, size), dtype) if host is None else None  # noqa: E731
    return KV(
        k=here(), v=here(), aux=None, layer=layer, slots=slots, rotated=rotated,
        pos=jnp.zeros((batch, rows), jnp.int32),
        mass=jnp.zeros((batch, rows), jnp.float32),
        fill=jnp.zeros((batch, layer.n_kv_heads), jnp.int32),
        seen=jnp.zeros((batch,), jnp.int32),
        tier=None if host is None else tiers.empty(batch, slots, size, dtype, host),
    )  # fmt: skip


def append(kv: KV, k: Tokens, v: Tokens, pos: Positions) -> tuple[KV, Slots]:
    """Writes T un-rotated tokens to the next free slots of every head.

    Tokens with pos < 0 are padding and take no slot. A token that finds no room is dropped, and
    under `kvjax.debug` raises; it never slides over others.

    Returns: the state, and the packed row of each token (R where nothing was written).

    Cost: writes 2·B·K·T·D elements; the donated state is updated in place.
    """
    return enter(kv, None, k, v, pos)[:2]


def enter(
    kv: KV, q: Queries | None, k: Tokens, v: Tokens, pos: Positions
) -> tuple[KV, Slots, Queries | None]:
    """Does as `append`, and rotates the tokens' queries on the way. Returns these, too."""
    valid = pos >= 0
    order = jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, -1)
    slot = kv.fill[:, :, None] + order[:, None, :]  # [B K T]
    written = valid[:, None, :] & (slot < jnp.asarray(kv.slots)[None, :, None])
    debug_check(
        lambda: jnp.all(written | ~valid[:, None, :]),
        "the KV cache overflows: allocate more slots or compress sooner",
    )
    idx = jnp.where(written, slot + starts(kv.slots)[None, :, None], kv.pos.shape[1])
    rows = {"pos": jnp.broadcast_to(pos[:, None, :], idx.shape), "mass": jnp.ones(idx.shape, kv.mass.dtype)}
    dense = kv.tier is None and not isinstance(kv.k, storage.Quantized)
    if dense:
        rows |= {"k": jnp.swapaxes(k, 1, 2).astype(kv.k.dtype), "v": jnp.swapaxes(v, 1, 2).astype(kv.v.dtype)}
    stores = {name: getattr(kv, name) for name in rows}
    turn = Turn(
        *angles(pos, kv.layer.rope, k.shape[-1]),
        vectors=(q, None if dense or not kv.rotated else k[:, :, :, None]),
        stores=tuple(name == "k" and kv.rotated for name in sorted(rows)),  # as a dict's leaves lie
    )
    stores, fill, seen, (q, turned) = append_rows(stores, rows, kv.fill, kv.seen, order, turn, slots=kv.slots)
    kv = kv.replace(**stores, fill=fill, seen=seen)
    if dense:
        return kv, idx, q
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k if turned is None else turned[:, :, :, 0], v))
    if kv.tier is not None:
        kv = kv.replace(tier=tiers.stage(kv.tier, jnp.where(written, slot, -1), k, v))
    else:
        stores = storage.write((kv.k, kv.v), idx, (k, v), kv.mass)
        kv = kv.replace(k=stores[0], v=stores[1])
    return kv, idx, q


def take(x: Array, idx: Int[Array, "B Q"], fill_value: float = 0) -> Array:
    """Gathers packed rows; idx -1 gives `fill_value`."""
    at = idx.reshape(idx.shape + (1,) * (x.ndim - 2))
    rows = jnp.take_along_axis(x, jnp.maximum(at, 0), axis=1)
    return jnp.where(at >= 0, rows, jnp.asarray(fill_value, x.dtype))


def keep(kv: KV, score: Packed, n_keep: Sequence[int], slots: Sequence[int]) -> tuple[KV, Int[Array, "B Q"]]:
    """Keeps the n_keep[head] slots of highest score in a state of capacity `slots`.

    Survivors stand in order of position, empty slots last. Ties go to the earlier slot.

    Returns: the state (aux untouched, storage dense), and for each new packed row the old one
    (-1 = empty), by which a method carries its own per-slot arrays along with `take`.
    """
    new, row = [], 0
    lowest = jnp.finfo(jnp.float32).min  # a slot is kept before none, whatever its score
    ranked = jnp.where(kv.mass > 0, jnp.maximum(score.astype(jnp.float32), lowest), -jnp.inf)
    for run in runs(kv.slots, n_keep, slots):
        size = slots[run.head]
        n = min(n_keep[run.head], size, run.size)
        best = select_topk(view(ranked, run), n)  # [B n_heads n], -1 = none
        alive = best >= 0
        when = jnp.take_along_axis(view(kv.pos, run), jnp.maximum(best, 0), -1)
        when = jnp.where(alive, when, jnp.iinfo(jnp.int32).max)
        order = jnp.argsort(when, axis=-1, stable=True)
        offset = run.row + jnp.arange(run.n)[None, :, None] * run.size
        old = jnp.where(alive, best + offset, -1)
        old = jnp.take_along_axis(old, order, -1)
        old = jnp.pad(old, ((0, 0), (0, 0), (0, size - n)), constant_values=-1)
        new.append(old.reshape(old.shape[0], -1))
        row += run.n * size
    idx = jnp.concatenate(new, axis=1)
    moved = kv.replace(
        k=take(storage.read(kv.k), idx),
        v=take(storage.read(kv.v), idx),
        pos=take(kv.pos, idx),
        mass=take(kv.mass, idx),
        slots=tuple(slots),
    )
    return moved.replace(fill=count(moved)), idx


def count(kv: KV) -> Int[Array, "B K"]:
    """Counts the occupied slots of each head."""
    parts = [(view(kv.mass, run) > 0).sum(-1, dtype=jnp.int32) for run in runs(kv.slots)]
    return jnp.concatenate(parts, axis=1)


def extent(kv: KV) -> Int[Array, "B K"]:
    """Returns how many slots of each head may be occupied: none at or beyond it is.

    Occupied slots lie below `fill`, except in a full head with a hole, whose last slot is occupied.
    """
    return attention.extent(kv.mass, kv.fill, kv.slots)


def when(flag: Array, change: Callable[[Any], Any], state: Any) -> Any:
    """Returns change(state) if flag, else state, inside a compiled program.

    It is a loop of at most one round: XLA updates a loop's state in place, and copies that of `lax.cond`.
    """

    def once(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        return jnp.zeros((), bool), change(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], once, (flag, state))[1]


def widen(kv: KV, slots: Sequence[int]) -> tuple[KV, Int[Array, "B Q"]]:
    """Grows every head to `slots`, with all the new slots free and `fill` at the first of them.

    Holes left by eviction stay empty. Returns the state and the old packed rows, as `keep`.
    """
    parts = []
    for run in runs(kv.slots, slots):
        size = slots[run.head]
        old = run.row + np.arange(run.n * run.size).reshape(run.n, run.size)
        parts.append(np.pad(old, ((0, 0), (0, size - run.size)), constant_values=-1).reshape(-1))
    idx = jnp.broadcast_to(np.concatenate(parts), (kv.pos.shape[0], sum(slots)))
    last = [
        jnp.max(jnp.where(view(kv.mass, run) > 0, jnp.arange(1, run.size + 1), 0), -1)
        for run in runs(kv.slots)
    ]
    grown = kv.replace(
        k=take(storage.read(kv.k), idx),
        v=take(storage.read(kv.v), idx),
        pos=take(kv.pos, idx),
        mass=take(kv.mass, idx),
        fill=jnp.concatenate(last, axis=1).astype(jnp.int32),
        slots=tuple(slots),
    )
    return grown, idx
