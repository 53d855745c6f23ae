"""Takes a step of the host tier apart: programs that do more and more of what it does, for all layers."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attend import attend, held
from kvjax.cache import Layer
from kvjax.method import CacheMethod
from kvjax.methods import per_layer
from kvjax.model import Model
from kvjax.states import State

__all__ = ["split"]

_PARTS = ("draw", "rank", "bring", "attend")


def split(model: Model, method: CacheMethod, state: State, steps: int, samples: int) -> dict[str, Any]:
    """Returns µs per step of ranking and selection, of bringing rows, and of attention, by differences.

    Queries are random in every step; what it takes to draw them is told apart. Consumes the state.
    """
    methods, times = per_layer(method, model.config), []
    for upto in range(1, len(_PARTS) + 1):
        taken = []
        for i in range(samples + 2):  # one compiles, one fills the lines
            start = time.perf_counter()
            total, state = _steps(state, i, methods=methods, upto=upto, steps=steps, dtype=model.dtype)
            jax.block_until_ready(total)
            taken.append((time.perf_counter() - start) / steps * 1e6)
        times.append(statistics.median(taken[2:]))
    parts = dict(zip(_PARTS, (b - a for a, b in zip([0.0, *times], times, strict=False)), strict=True))
    return {f"{name}_us": value for name, value in parts.items()}


@functools.partial(jax.jit, static_argnames=("methods", "upto", "steps", "dtype"), donate_argnames="state")
def _steps(state: State, seed: int, *, methods: tuple, upto: int, steps: int, dtype: Any) -> tuple:
    """Runs the first `upto` parts of decode steps, without new tokens."""

    def step(i, carry):
        total, state = carry
        new = []
        for j, (kv, method) in enumerate(zip(state, methods, strict=True)):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), j)
            q = jax.random.normal(key, _shape(kv.layer, len(kv.seen)), dtype)
            kv = kv.replace(seen=kv.seen + 1)  # the clock of the lines
            pos = kv.seen[:, None] - 1
            out = q
            if upto > 1:
                chosen = method.select(kv, q, pos)
                out = chosen.idx
            if upto > 2:
                kv, here, chosen = held(kv, pos, chosen)
                out = chosen.idx
            if upto > 3:
                out = attend(here, q, pos, chosen)
            total = total + jnp.sum(out, dtype=jnp.float32)
            new.append(kv)
        return total, tuple(new)

    return jax.lax.fori_loop(0, steps, step, (jnp.float32(0), state))


def _shape(layer: Layer, batch: int) -> tuple[int, ...]:
    return batch, 1, layer.n_kv_heads, layer.group, layer.head_dim
