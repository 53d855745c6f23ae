"""Attends over a KV state: the float32 reference, written from the equation.

    out_t = Σ_s softmax_s(scale·q_t·k_s + log mass_s) v_s     over slots with pos_s <= pos_t

Every head's slots are read in full, or, with a `Selection`, only those it lists.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax import storage
from kvjax.cache import KV, Layer, runs, starts, take, view
from kvjax.rope import rotate
from kvjax.shapes import Positions, Queries

__all__ = ["Selection", "attend", "precision", "weights"]


@struct.dataclass
class Selection:
    """Which blocks of slots each KV head reads: indices with a static length, -1 = none."""

    idx: jax.Array  # [B K N] int32
    block: int = struct.field(pytree_node=False)  # slots per block, P


def attend(
    kv: KV, q: Queries, pos: Positions, selection: Selection | None = None
) -> Float[Array, "B T K G D"]:
    """Returns attention of T un-rotated queries over the slots; a row with no slot gives 0.

    Cost: reads K and V of every slot once, 2·B·R·D elements (of the selected slots only, with a
    selection), and 4·B·T·G·R·D FLOPs.
    """
    q = _rotate_queries(kv, q, pos)
    if selection is not None:
        return _attend_dense(kv.layer, q, pos, *_selected(kv, selection))
    keys, values = storage.read(kv.k), storage.read(kv.v)
    out = []
    for run in runs(kv.slots):
        part = (view(keys, run), view(values, run), view(kv.pos, run), view(kv.mass, run))
        heads = slice(run.head, run.head + run.n)
        out.append(_attend_dense(kv.layer, q[:, :, heads], pos, *_with_rotation(kv, part)))
    return jnp.concatenate(out, axis=2)


def weights(kv: KV, q: Queries, pos: Positions) -> Float[Array, "B G T R"]:
    """Returns the attention weights of un-rotated queries over the packed slots.

    Queries with pos < 0 are padding and give 0.
    """
    q = _rotate_queries(kv, q, pos)
    keys = storage.read(kv.k)
    out = []
    for run in runs(kv.slots):
        key, _, when, mass = _with_rotation(kv, (view(keys, run), None, view(kv.pos, run), view(kv.mass, run)))
        p = jax.nn.softmax(_logits(kv.layer, q[:, :, run.head : run.head + run.n], pos, key, when, mass), axis=-1)
        p = jnp.where((pos >= 0)[:, None, None, :, None], p, 0)
        out.append(jnp.moveaxis(p, 1, 3).reshape(*p.shape[:1], p.shape[2], p.shape[3], -1))
    return jnp.concatenate(out, axis=-1)


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Keeps float32 products in float32 where hardware would round their factors."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _rotate_queries(kv: KV, q: Array, pos: Array) -> Array:
    return rotate(q, jnp.broadcast_to(pos[:, :, None, None], q.shape[:4]), kv.layer.rope)


def _with_rotation(kv: KV, part: tuple) -> tuple:
    """Rotates keys that are stored un-rotated."""
    keys, values, when, mass = part
    return (keys if kv.rotated else rotate(keys, when, kv.layer.rope)), values, when, mass


def _selected(kv: KV, selection: Selection) -> tuple:
    """Gathers the selected slots as keys, values [B K NP D], positions and masses [B K NP]."""
    slot = selection.idx[..., None] * selection.block + jnp.arange(selection.block)  # [B K N P]
    inside = (selection.idx[..., None] >= 0) & (slot < jnp.asarray(kv.slots)[None, :, None, None])
    row = jnp.where(inside, slot + starts(kv.slots)[None, :, None, None], -1)
    shape = (*row.shape[:2], -1)
    row = row.reshape(row.shape[0], -1)
    rows = (take(x, row) for x in (storage.read(kv.k), storage.read(kv.v), kv.pos, kv.mass))
    part = tuple(x.reshape(*shape, *x.shape[2:]) for x in rows)
    return _with_rotation(kv, part)


def _logits(layer: Layer, q: Array, pos: Array, keys: Array, when: Array, mass: Array) -> Array:
    """Returns masked logits [B K G T S] in float32."""
    exact = precision(q.dtype)
    logit = jnp.einsum("btkgd,bksd->bkgts", q, keys, precision=exact, preferred_element_type=jnp.float32)
    logit = logit * layer.scale
    if layer.softcap is not None:
        logit = layer.softcap * jnp.tanh(logit / layer.softcap)
    visible = (mass > 0)[:, :, None, None, :] & (when[:, :, None, None, :] <= pos[:, None, None, :, None])
    if layer.window is not None:
        visible &= when[:, :, None, None, :] > pos[:, None, None, :, None] - layer.window
    weight = jnp.log(jnp.where(mass > 0, mass, 1.0))[:, :, None, None, :]
    return jnp.where(visible, logit + weight, jnp.finfo(jnp.float32).min)


def _attend_dense(
    layer: Layer,
    q: Float[Array, "B T K G D"],
    pos: Int[Array, "B T"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    when: Int[Array, "B K S"],
    mass: Float[Array, "B K S"],
) -> Float[Array, "B T K G D"]:
    """Attends with rotated queries over one dense view."""
    logit = _logits(layer, q, pos, keys, when, mass)
    top = jnp.max(logit, axis=-1, keepdims=True)
    p = jnp.where(logit > jnp.finfo(jnp.float32).min, jnp.exp(logit - top), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = (p / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(values.dtype)
    values = jnp.where((mass > 0)[..., None], values, 0)  # an empty slot may hold NaN, and 0·NaN is NaN
    exact = precision(p.dtype)
    out = jnp.einsum("bkgts,bksd->btkgd", p, values, precision=exact, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
