"""Records which slots decode steps choose to read, so that caches of their rows can be simulated."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int

import kvjax
from kvjax import tiers
from kvjax.attend import Selection
from kvjax.cache import KV, Layer
from kvjax.method import CacheMethod
from kvjax.methods import per_layer
from kvjax.shapes import Leaf, Positions, Queries, Slots, Tokens

__all__ = ["Recorded", "Steps", "record"]


@dataclass(frozen=True)
class Steps:
    """What T decode steps read of one layer, in B documents of one length."""

    slot: Int[np.ndarray, "B K T N"]  # slots of each KV head, or the first ones of blocks; -1 = none
    seen: Int[np.ndarray, " T"]  # tokens seen, the step's own included
    first: Int[np.ndarray, " T"]  # slots that lie on the host while the step runs; later ones are staged
    size: int  # slots of a head

    def blocks(self, block: int) -> Int[np.ndarray, "B K T N"]:
        """Returns the blocks of so many slots that are read, each once; -1 = none."""
        idx = np.where(self.slot >= 0, self.slot // block, -1)
        again = np.zeros(idx.shape, bool)
        again[..., 1:] = idx[..., 1:] == idx[..., :-1]
        return np.where(again, -1, idx)

    def n_blocks(self, block: int) -> int:
        """Returns how many blocks a head has."""
        return -(-self.size // block)


@struct.dataclass
class Trace:
    """A method's own index, and what its steps have chosen."""

    aux: Leaf
    slot: Leaf  # [B T K N] int32, slots or the first ones of blocks, -1 = none
    step: Leaf  # [] int32, steps taken


@dataclass(frozen=True)
class Recorded(CacheMethod):
    """A method that records what its first `steps` decode steps choose. aux: `Trace`, where it chooses.

    method: one that selects in every layer, but where its `topk` is None.
    """

    method: Any
    steps: int

    def for_layer(self, index: int, n_layers: int) -> "Recorded":
        """Returns the method of one layer, which records."""
        return replace(self, method=self.method.for_layer(index, n_layers))

    def init(self, layer: Layer, batch: int, slots, dtype: Any) -> KV:
        """Returns the method's empty state, with room for the steps."""
        kv = self.method.init(layer, batch, slots, dtype)
        if self.method.topk is None:
            return kv
        q = jax.ShapeDtypeStruct((batch, 1, layer.n_kv_heads, layer.group, layer.head_dim), dtype)
        chosen = jax.eval_shape(self.method.select, kv, q, jax.ShapeDtypeStruct((batch, 1), jnp.int32))
        slot = jnp.full((batch, self.steps, *chosen.idx.shape[1:]), -1, jnp.int32)
        return kv.replace(aux=Trace(kv.aux, slot, jnp.int32(0)))

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Lets the method observe; in a decode step, records what it is about to read."""
        if self.method.topk is None:
            return self.method.observe(kv, q, k, pos, idx)
        own = self.method.observe(_own(kv), q, k, pos, idx)
        trace = kv.aux.replace(aux=own.aux)
        if q.shape[1] == 1:
            chosen = self.method.select(own, q, pos)
            slot = jnp.where(chosen.idx >= 0, chosen.idx * chosen.block, -1)
            slot = trace.slot.at[:, trace.step].set(slot, mode="drop")
            trace = trace.replace(slot=slot, step=trace.step + 1)
        return own.replace(aux=trace)

    def select(self, kv: KV, q: Queries, pos: Positions) -> Selection | None:
        """Returns what the method selects."""
        return None if self.method.topk is None else self.method.select(_own(kv), q, pos)

    def moved(self, kv: KV, idx: jax.Array | None) -> KV:
        """Lets the method refresh its index."""
        if self.method.topk is None:
            return self.method.moved(kv, idx)
        own = self.method.moved(_own(kv), idx)
        return own.replace(aux=kv.aux.replace(aux=own.aux))


def _own(kv: KV) -> KV:
    return kv.replace(aux=kv.aux.aux)


def record(
    model: kvjax.Model, method: Any, documents: Int[np.ndarray, "B T"], n_rest: int
) -> dict[int, Steps]:
    """Reads all but the end of each document, decodes its last n_rest tokens, and returns what steps read.

    Args:
        method: see `Recorded`.

    Returns: of each layer that chooses; none of those that are read in full, or through a window.
    """
    recorded, found = Recorded(method, n_rest), {}
    ranked = [
        i
        for i, m in enumerate(per_layer(recorded, model.config))
        if isinstance(m, Recorded) and m.method.topk is not None
    ]
    for row in documents[:, None]:  # one by one: memory is that of one
        logits, state = kvjax.prefill(model, row[:, :-n_rest], recorded, room=n_rest)
        _, _, state, _ = kvjax.decode(model, logits, state, recorded, row[:, -n_rest:])
        for i in ranked:
            found.setdefault(i, []).append(np.swapaxes(np.asarray(state[i].aux.slot), 1, 2))
    step, length = np.arange(n_rest), documents.shape[1] - n_rest
    first = length + step // tiers.STEPS * tiers.STEPS
    return {
        i: Steps(np.concatenate(slot), length + step + 1, first, state[i].slots[0])
        for i, slot in found.items()
    }
