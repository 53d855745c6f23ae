"""Makes the state of a model, and moves or resizes it between programs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kvjax import cache, context_folder, disk, host_memory, sharding, tiers
from kvjax.cache import KV, Layer
from kvjax.method import CacheMethod
from kvjax.methods import layers, per_layer
from kvjax.model import Model, fingerprint

__all__ = ["State", "check_room", "each_layer", "init_state", "settle", "widen"]

State = tuple[KV, ...]


def init_state(model: Model, method: CacheMethod, batch: int, total: int, prompt: int = 0) -> State:
    """Makes an empty state that serves `total` tokens per row, `prompt` of them read at once.

    Raises:
        ValueError: where total is larger than the model's context, or a budget is; where the model
            is spread over devices and the heads cannot be, see `sharding.check`.
        MemoryError: where the host has too little memory for what shall lie there.
    """
    context = model.config.context_length
    if not 0 < total <= context:
        raise ValueError(f"prompt and new tokens fit the context of {context} tokens, got {total=}")
    makers = []
    for m, layer in zip(per_layer(method, model.config), layers(model.config), strict=True):
        if getattr(m, "budget", None) is not None and max(m.budgets(layer)) > context:
            raise ValueError(f"a budget is at most the context of {context} tokens, got {m.budgets(layer)}")
        slots = tuple(max(s, prompt) for s in m.slots(layer, total)) if m.evicts else m.slots(layer, total)
        sharding.check(model.mesh, m, slots)
        makers.append(functools.partial(_init, m, layer, batch, slots, model.dtype, model.mesh))
    if any(m.tier != "device" for m in per_layer(method, model.config)):
        host_memory.check_memory([jax.eval_shape(make) for make in makers])
    state = tuple(make() for make in makers)
    if not any(map(disk.on_disk, state)):
        return state
    return disk.attach(state, method.folder, context_folder.identity(fingerprint(model), repr(method)))


def _init(
    method: CacheMethod, layer: Layer, batch: int, slots: tuple[int, ...], dtype: Any, mesh: Mesh | None
) -> KV:
    """Makes the empty state of one layer, on each device its own part."""
    if mesh is None:
        return method.init(layer, batch, slots, dtype)
    return _init_spread(method, layer, batch, slots, dtype, mesh, method.learnt)


@functools.partial(jax.jit, static_argnums=range(7))
def _init_spread(method, layer, batch, slots, dtype, mesh, learnt) -> KV:
    kv = method.init(layer, batch, slots, dtype)
    return jax.lax.with_sharding_constraint(kv, sharding.of_state(kv, mesh))


def settle(state: State, methods: Sequence[CacheMethod], room: int = tiers.STEPS) -> State:
    """Moves off the device what programs have staged; the next one may stage `room` tokens."""
    for kv in filter(disk.on_disk, state):
        disk.append(kv)
    return tuple(
        kv if kv.tier is None else _settled(kv, m, room) for kv, m in zip(state, methods, strict=True)
    )


def _settled(kv: KV, method: CacheMethod, room: int) -> KV:
    kv = _flush(kv)
    return method.settled(kv.replace(tier=tiers.resize(kv.tier, room)), room)


@functools.partial(jax.jit, donate_argnames="kv")
def _flush(kv: KV) -> KV:
    return kv.replace(tier=tiers.flush(kv.tier, kv.fill, kv.slots))


def widen(state: State, model: Model, method: CacheMethod, extra: int) -> State:
    """Gives methods that evict room for `extra` tokens beyond their budget, and stores full precision."""
    methods, options = per_layer(method, model.config), {"extra": extra, "mesh": model.mesh}
    return each_layer(state, lambda i, kv: _widen_layer(kv, method=methods[i], **options))


@functools.partial(jax.jit, static_argnames=("method", "extra", "mesh"))
def _widen_layer(kv: KV, *, method: CacheMethod, extra: int, mesh: Mesh | None) -> KV:
    if kv.tier is not None:
        return kv

    def step(method: CacheMethod, kv: KV) -> tuple[KV, None]:
        kv, idx = cache.widen(kv, tuple(s + extra * method.evicts for s in kv.slots))
        return method.moved(kv, idx), None

    return sharding.over_heads(mesh, step, method, kv)[0]


def each_layer(state: State, change: Callable[[int, KV], KV]) -> State:
    """Changes the shape of every layer in turn, so that one layer at a time exists twice."""
    old = list(state)[::-1]
    return tuple(change(i, old.pop()) for i in range(len(state)))


def check_room(state: State, methods: Sequence[CacheMethod], extra: int) -> None:
    """Raises where a state cannot take `extra` more tokens, or has fewer slots than its budget wants then."""
    for kv, m in zip(state, methods, strict=True):
        used = int(np.max(np.asarray(kv.fill)))
        if any(n > s for n, s in zip(m.slots(kv.layer, used + extra), kv.slots, strict=True)):
            raise ValueError(
                f"the state has room for the prompt, got {used} + {extra} tokens in {min(kv.slots)} slots: "
                "make it with more room"
            )
