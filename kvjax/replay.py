"""Hands one dense prefill to many methods: records what attention was given, and replays it.

A method that compresses at the prompt's end does not change what later layers see of the prompt,
so one dense pass serves every method and budget.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import cache
from kvjax.cache import KV, Layer
from kvjax.loop import State, init_state, pad
from kvjax.method import CacheMethod
from kvjax.methods import layers, per_layer
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.models.decoder import Decoder, Record

__all__ = ["record", "replay"]


def record(
    model: Model, prompts: Sequence[Sequence[int]], *, room: int, chunk: int = 512
) -> tuple[Float[Array, "B V"], Int[Array, "B T"], tuple[Record, ...]]:
    """Reads prompts densely.

    Returns: logits after the last token, positions (-1 = padding), and per layer the un-rotated
    queries, keys and values of all tokens.
    """
    ids = pad(prompts, chunk)
    methods = per_layer(Full(), model.config)
    state = init_state(model, Full(), len(ids), min(ids.shape[1] + room, model.config.context_length), ids.shape[1])
    pos = np.where(ids >= 0, np.cumsum(ids >= 0, axis=1) - 1, -1).astype(np.int32)
    parts = []
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        logits, state, records = _read_recording(
            model.params, ids[:, part], pos[:, part], state, config=model.config, dtype=model.dtype, methods=methods
        )
        parts.append(records)
    joined = tuple(Record(*(jnp.concatenate(x, axis=1) for x in zip(*layer, strict=True))) for layer in zip(*parts, strict=True))
    return logits[:, 0], jnp.asarray(pos), joined


@functools.partial(jax.jit, static_argnames=("config", "dtype", "methods"), donate_argnames="state")
def _read_recording(params, ids, pos, state, *, config, dtype, methods):
    return Decoder(config, dtype).apply({"params": params}, ids, pos, state, methods, last_only=True)


def replay(
    model: Model, method: CacheMethod, records: Sequence[Record], pos: Int[Array, "B T"], *, room: int, chunk: int = 512
) -> State:
    """Returns the state that `prefill` with this method would have left, without the model's work.

    Args:
        room: tokens that will follow.
    """
    total = min(pos.shape[1] + room, model.config.context_length)
    methods = per_layer(method, model.config)
    chunk = max(chunk, *(m.n_queries for m in methods))
    return tuple(
        _replay_layer(r, pos, layer=layer, method=m, total=total, chunk=chunk)
        for r, layer, m in zip(records, layers(model.config), methods, strict=True)
    )


@functools.partial(jax.jit, static_argnames=("layer", "method", "total", "chunk"))
def _replay_layer(r: Record, pos: Array, *, layer: Layer, method: CacheMethod, total: int, chunk: int) -> KV:
    """Runs the verbs of one layer over a recorded prompt, chunk by chunk."""
    batch, length = pos.shape
    lead = -length % chunk
    r = Record(*(jnp.pad(x, ((0, 0), (lead, 0), *[(0, 0)] * (x.ndim - 2))) for x in r))
    pos = jnp.pad(pos, ((0, 0), (lead, 0)), constant_values=-1)
    slots = method.slots(layer, total)
    slots = tuple(max(s, length) for s in slots) if method.evicts else slots
    kv = method.init(layer, batch, slots, r.k.dtype)

    def one(kv, i):
        q, k, v, p = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in (*r, pos))
        kv, idx = cache.append(kv, k, v, p)
        return method.observe(kv, q, p, idx), None

    kv, _ = jax.lax.scan(one, kv, jnp.arange((length + lead) // chunk))
    return method.compress(kv, r.q[:, -chunk:], pos[:, -chunk:])
