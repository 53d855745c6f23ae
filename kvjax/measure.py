"""Measures quality and bytes; pure functions of logits and states."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.method import CacheMethod
from kvjax.states import State
from pallas_kernels.host import on_host

__all__ = ["bytes_read", "host_bytes", "kl", "nbytes", "nll", "perplexity", "top1_agreement"]


def nll(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns -log p(target) in nats."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def perplexity(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> float:
    """Returns exp of the mean negative log-likelihood."""
    return float(jnp.exp(nll(logits, targets).mean()))


def kl(full: Float[Array, "*B V"], other: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Returns KL(full ‖ other) in nats."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (full, other))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def top1_agreement(full: Float[Array, "*B V"], other: Float[Array, "*B V"]) -> float:
    """Returns the share of places where both prefer the same token."""
    return float(jnp.mean(jnp.argmax(full, -1) == jnp.argmax(other, -1)))


def nbytes(state: Any) -> int:
    """Returns the bytes of all leaves; of a state: keys, values, positions, masses and the index."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def host_bytes(state: Any) -> int:
    """Returns the bytes of the leaves that lie in host memory; `nbytes` counts them too."""
    return sum(nbytes(leaf) for leaf in jax.tree.leaves(state) if on_host(leaf))


def bytes_read(state: State, methods: Sequence[CacheMethod]) -> int:
    """Returns the bytes of the state that one decode step reads, from shapes alone.

    Without a selection that is everything; with one, the selected slots and the index.
    """
    total = 0
    for kv, method in zip(state, methods, strict=True):
        layer, batch = kv.layer, kv.fill.shape[0]
        q = jax.ShapeDtypeStruct((batch, 1, layer.n_kv_heads, layer.group, layer.head_dim), jnp.float32)
        pos = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        chosen = jax.eval_shape(method.select, kv, q, pos)
        if chosen is None:
            total += nbytes(kv)
            continue
        per_slot = nbytes((kv.rows, kv.pos, kv.mass)) / (batch * sum(kv.slots))
        read = batch * layer.n_kv_heads * min(chosen.idx.shape[-1] * chosen.block, max(kv.slots))
        total += int(read * per_slot) + nbytes(kv.aux)
    return total
