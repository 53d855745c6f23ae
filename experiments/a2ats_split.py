"""Takes a step of the host tier apart: programs that do more and more of what it does, for all layers."""

import functools
import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from experiments.a2ats_steps import tokens_read
from kvjax import replay
from kvjax.attend import attend, held
from kvjax.method import CacheMethod
from kvjax.methods import per_layer
from kvjax.model import Model
from kvjax.shapes import Queries
from kvjax.states import State

__all__ = ["split"]

_PARTS = ("rank", "bring", "attend")


def split(model: Model, method: CacheMethod, state: State, settings: Any) -> dict[str, Any]:
    """Returns µs per step of ranking and selection, of bringing rows, and of attention, by differences.

    Queries are those that the model has for random tokens, so that steps ask for the same tokens again as
    often as its own do; `hit_rate` is the share of them found on the device. Consumes the state.

    settings: `steps` of a call, `samples` and `seed`.
    """
    methods, times, before = per_layer(method, model.config), [], (0.0, 0.0)
    rng = np.random.default_rng(settings.seed)
    for upto in range(len(_PARTS) + 1):
        taken = []
        for i in range(settings.samples + 2):  # one compiles, one fills the lines
            q = _asked(model, rng.integers(0, model.config.vocab_size, (len(state[0].seen), settings.steps)))
            start = time.perf_counter()
            total, state = _steps(state, q, methods=methods, upto=upto)
            jax.block_until_ready(total)
            taken.append((time.perf_counter() - start) / settings.steps * 1e6)
            before = tokens_read(state) if i == 1 else before
        times.append(statistics.median(taken[2:]))
    read, missed = (b - a for a, b in zip(before, tokens_read(state), strict=True))
    parts = dict(zip(_PARTS, (b - a for a, b in itertools.pairwise(times)), strict=True))
    return {f"{name}_us": value for name, value in parts.items()} | {"hit_rate": 1 - missed / read}


def _asked(model: Model, ids: Int[np.ndarray, "B T"]) -> tuple[Queries, ...]:
    """Returns the queries [T B 1 K G D] of every layer, of tokens that see none but themselves."""
    _, _, records = replay.record(model, ids.T.reshape(-1, 1).tolist(), room=0, chunk=1)
    shape = ids.shape[::-1]
    return jax.block_until_ready(tuple(r.q.reshape(*shape, *r.q.shape[1:]) for r in records))


@functools.partial(jax.jit, static_argnames=("methods", "upto"), donate_argnames="state")
def _steps(state: State, asked: tuple, *, methods: tuple, upto: int) -> tuple:
    """Runs the first `upto` parts of decode steps, without new tokens."""

    def step(carry, queries):
        total, state = carry
        new = []
        for kv, method, q in zip(state, methods, queries, strict=True):
            kv = kv.replace(seen=kv.seen + 1)  # the clock of the lines
            pos = kv.seen[:, None] - 1
            out = q
            if upto > 0:
                chosen = method.select(kv, q, pos)
                out = chosen.idx
            if upto > 1:
                kv, here, chosen = held(kv, pos, chosen)
                out = chosen.idx
            if upto > 2:
                out = attend(here, q, pos, chosen)
            total = total + jnp.sum(out, dtype=jnp.float32)
            new.append(kv)
        return (total, tuple(new)), None

    return jax.lax.scan(step, (jnp.float32(0), state), asked)[0]
