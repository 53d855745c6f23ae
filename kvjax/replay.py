"""Hands one dense prefill to many methods: records what attention was given, and replays it.

A method that compresses at the prompt's end does not change what later layers see of the prompt,
so one dense pass serves every method and budget.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import cache, text
from kvjax.cache import KV, Layer
from kvjax.method import CacheMethod
from kvjax.methods import layers, per_layer
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.models.decoder import Record
from kvjax.program import Program
from kvjax.reading import pad
from kvjax.states import State, init_state, settle

__all__ = ["finish", "read", "record", "replay"]


def record(
    model: Model, prompts: Sequence[Sequence[int]], *, room: int, chunk: int = 512
) -> tuple[Float[Array, "B V"], Int[Array, "B T"], tuple[Record, ...]]:
    """Reads prompts densely.

    Returns: logits after the last token, positions (-1 = padding), and per layer the un-rotated
    queries, keys and values of all tokens.

    Raises:
        ValueError: for prompts that the model cannot read.
    """
    text.check(prompts, model.config)
    ids = pad(prompts, chunk)
    program = Program.of(model, Full())
    state = init_state(
        model, Full(), len(ids), min(ids.shape[1] + room, model.config.context_length), ids.shape[1]
    )
    pos = np.where(ids >= 0, np.cumsum(ids >= 0, axis=1) - 1, -1).astype(np.int32)
    parts = []
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        logits, state, records = _read_recording(
            model.variables, ids[:, part], pos[:, part], state, program=program
        )
        parts.append(records)
    joined = tuple(
        Record(*(jnp.concatenate(x, axis=1) for x in zip(*layer, strict=True)))
        for layer in zip(*parts, strict=True)
    )
    return logits[:, 0], jnp.asarray(pos), joined


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _read_recording(variables, ids, pos, state, *, program: Program):
    return program.run(variables, ids, pos, state, last_only=True)


def replay(
    model: Model,
    method: CacheMethod,
    records: Sequence[Record],
    pos: Int[Array, "B T"],
    *,
    room: int,
    chunk: int = 512,
) -> State:
    """Returns the state that `prefill` with this method would have left, without the model's work.

    Args:
        room: tokens that will follow.
    """
    return finish(model, method, read(model, method, records, pos, room=room, chunk=chunk), records, pos)


def read(
    model: Model,
    method: CacheMethod,
    records: Iterable[Record],
    pos: Int[Array, "B T"],
    *,
    room: int,
    later: int = 0,
    chunk: int = 512,
    state: State | None = None,
) -> State:
    """Replays a prompt, or the next part of one, up to where it would be compressed.

    What a method observes of a prompt does not depend on a budget that is below the prompt's
    length (a law), so one state serves several budgets; `finish` leaves it as it is.

    Args:
        room: tokens that will follow.
        later: how many of them belong to the prompt, and come by another call.
        state: what the call before returned.
    """
    total = min(pos.shape[1] + room, model.config.context_length)
    methods = per_layer(method, model.config)
    if state is None:
        state = tuple(
            _empty(pos, layer, m, total, pos.shape[1] + later, model.dtype)
            for layer, m in zip(layers(model.config), methods, strict=True)
        )
    state = settle(state, methods, -(-pos.shape[1] // chunk) * chunk)
    return settle(
        tuple(
            _read_layer(kv, r, pos, method=m, chunk=chunk)
            for kv, r, m in zip(state, records, methods, strict=True)
        ),
        methods,
    )


def finish(
    model: Model, method: CacheMethod, state: State, records: Iterable[Record], pos: Int[Array, "B T"]
) -> State:
    """Compresses a replayed prompt; the given state is kept."""
    methods = per_layer(method, model.config)
    n_queries = max(m.n_queries for m in methods)
    newest = slice(max(pos.shape[1] - n_queries, 0), None)
    return tuple(
        _finish_layer(kv, r.q[:, newest], pos[:, newest], method=m)
        for kv, r, m in zip(state, records, methods, strict=True)
    )


def _empty(pos: Array, layer: Layer, method: CacheMethod, total: int, prompt: int, dtype: Any) -> KV:
    """Returns a state with room for a prompt that is compressed at its end."""
    slots = method.slots(layer, total)
    slots = tuple(max(s, prompt) for s in slots) if method.evicts else slots
    return method.init(layer, pos.shape[0], slots, dtype)


@functools.partial(jax.jit, static_argnames=("method", "chunk"))
def _read_layer(kv: KV, r: Record, pos: Array, *, method: CacheMethod, chunk: int) -> KV:
    """Runs the verbs of one layer over a recorded prompt, chunk by chunk."""
    length = pos.shape[1]
    chunk = min(chunk, length)
    lead = -length % chunk
    r = Record(*(jnp.pad(x, ((0, 0), (lead, 0), *[(0, 0)] * (x.ndim - 2))) for x in r))
    pos = jnp.pad(pos, ((0, 0), (lead, 0)), constant_values=-1)

    def one(kv, i):
        q, k, v, p = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in (*r, pos))
        kv, idx = cache.append(kv, k, v, p)
        return method.observe(kv, q, k, p, idx), None

    return jax.lax.scan(one, kv, jnp.arange((length + lead) // chunk))[0]


@functools.partial(jax.jit, static_argnames="method")
def _finish_layer(kv: KV, q: Array, pos: Array, *, method: CacheMethod) -> KV:
    """Compresses one layer into buffers of its own, so that decoding may consume them."""
    return jax.tree.map(jnp.copy, method.compress(kv, q, pos))
