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
from kvjax.cache import KV, Layer, extent, runs, starts, take, view
from kvjax.rope import rotate
from kvjax.shapes import Leaf, Positions, Queries
from pallas_kernels import AttentionForm, decode_attention, join

_BLOCK = 256  # slots per step of a prompt's attention
_NEVER = float(jnp.finfo(jnp.float32).min)  # logit of a slot that is not visible

__all__ = ["Selection", "attend", "precision", "weights"]


@struct.dataclass
class Selection:
    """Which blocks of slots each KV head reads: indices with a static length, -1 = none."""

    idx: Leaf  # [B K N] int32
    block: int = struct.field(pytree_node=False)  # slots per block, P


def attend(
    kv: KV, q: Queries, pos: Positions, selection: Selection | None = None
) -> Float[Array, "B T K G D"]:
    """Returns attention of T un-rotated queries over the slots; a row with no slot gives 0.

    One query per row is that of the newest token, so that no slot is later: it runs in the
    decode kernels. A row with pos < 0 is padding and gives 0.

    Cost: reads K and V of every slot once, 2·B·R·D elements (of the selected slots only, with a
    selection), and 4·B·T·G·R·D FLOPs.
    """
    q = _rotate_queries(kv, q, pos)
    if q.shape[1] == 1:
        return _attend_newest(kv, q[:, 0], pos, selection)[:, None]
    if selection is not None:
        return _attend_dense(kv.layer, q, pos, *_selected(kv, selection))
    keys, values = storage.read(kv.k), storage.read(kv.v)
    out = []
    for run in runs(kv.slots):
        part = (view(keys, run), view(values, run), view(kv.pos, run), view(kv.mass, run))
        heads = slice(run.head, run.head + run.n)
        out.append(_attend_dense(kv.layer, q[:, :, heads], pos, *_with_rotation(kv, part)))
    return jnp.concatenate(out, axis=2)


def _attend_newest(kv: KV, q: Float[Array, "B K G D"], pos: Positions, selection: Selection | None) -> Array:
    """Attends with one rotated query per row, by kernels that read the store as it is."""
    mass = kv.mass
    if kv.layer.window is not None:
        mass = jnp.where(kv.pos > pos - kv.layer.window, mass, 0.0)
    length = jnp.where(pos >= 0, extent(kv), 0)
    if isinstance(kv.k, storage.Quantized):
        return _attend_quantized(kv, q, mass, length, selection)
    keys = kv.k if kv.rotated else rotate(kv.k, kv.pos, kv.layer.rope)
    return _kernel(kv, q, (keys, kv.v), mass, length, selection, lse=False)


def _kernel(
    kv: KV, q: Array, rows: tuple, mass: Array, length: Array, selection: Selection | None, lse: bool
):
    """Calls the decode kernel, dense or sparse."""
    form = AttentionForm(kv.slots, kv.layer.scale, kv.layer.softcap, lse)
    if selection is None:
        return decode_attention(q, *rows, mass, length, form=form)
    from pallas_kernels.sparse_decode_attention import sparse_decode_attention

    idx = jnp.where(length[..., None] > 0, selection.idx, -1)
    return sparse_decode_attention(q, *rows, mass, idx, form=form, block=selection.block)


def _attend_quantized(kv: KV, q: Array, mass: Array, length: Array, selection: Selection | None) -> Array:
    """Attends over the codes and over the rings of recent rows, which override theirs, and joins the two."""
    slot = kv.k.slot  # [B K W], the same for keys and values: they are written together
    recent = (store.recent.reshape(q.shape[0], -1, q.shape[-1]) for store in (kv.k, kv.v))
    batch, n_rows = jnp.arange(q.shape[0])[:, None, None], mass.shape[1]
    ring_mass = jnp.where(slot < n_rows, mass[batch, jnp.minimum(slot, n_rows - 1)], 0.0)
    if selection is not None:
        block = (slot - starts(kv.slots)[None, :, None]) // selection.block
        chosen = (block[..., None] == selection.idx[:, :, None]) & (selection.idx[:, :, None] >= 0)
        ring_mass = jnp.where(chosen.any(-1), ring_mass, 0.0)
    ring_mass = jnp.where(length[..., None] > 0, ring_mass, 0.0).reshape(q.shape[0], -1)
    codes = _kernel(
        kv, q, (kv.k.as_codes(), kv.v.as_codes()), mass.at[batch, slot].set(0.0, mode="drop"), length,
        selection, lse=True,
    )  # fmt: skip
    form = AttentionForm((slot.shape[2],) * slot.shape[1], kv.layer.scale, kv.layer.softcap, lse=True)
    return join([codes, decode_attention(q, *recent, ring_mass, form=form)])


def weights(kv: KV, q: Queries, pos: Positions) -> Float[Array, "B G T R"]:
    """Returns the attention weights of un-rotated queries over the packed slots.

    Queries with pos < 0 are padding and give 0.

    Cost: reads K once and holds B·G·T·R weights.
    """
    q = _rotate_queries(kv, q, pos)
    keys = storage.read(kv.k)
    batch, length, _, group, size = q.shape
    out = []
    for run in runs(kv.slots):
        key, _, when, mass = _with_rotation(
            kv, (view(keys, run), None, view(kv.pos, run), view(kv.mass, run))
        )
        rows = jnp.moveaxis(q[:, :, run.head : run.head + run.n], 1, 3).reshape(batch, run.n, -1, size)
        p = jax.nn.softmax(_logits(kv.layer, rows, jnp.tile(pos, (1, group)), key, when, mass), axis=-1)
        p = jnp.where(jnp.tile(pos >= 0, (1, group))[:, None, :, None], p, 0.0)
        out.append(jnp.moveaxis(p, 1, 2).reshape(batch, group, length, -1))
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
    """Returns masked logits [B K X S] in float32, X = queries of the group at their positions."""
    exact = precision(q.dtype)
    logit = jnp.einsum("bkxd,bksd->bkxs", q, keys, precision=exact, preferred_element_type=jnp.float32)
    logit = logit * layer.scale
    if layer.softcap is not None:
        logit = layer.softcap * jnp.tanh(logit / layer.softcap)
    visible = (mass > 0)[:, :, None, :] & (when[:, :, None, :] <= pos[:, None, :, None])
    if layer.window is not None:
        visible &= when[:, :, None, :] > pos[:, None, :, None] - layer.window
    return jnp.where(visible, logit + jnp.log(jnp.where(mass > 0, mass, 1.0))[:, :, None, :], _NEVER)


def _partial(
    layer: Layer, q: Array, pos: Array, keys: Array, values: Array, when: Array, mass: Array
) -> tuple:
    """Returns the largest logit [B K X], the sum of weights [B K X] and the weighted values [B K X D]."""
    logit = _logits(layer, q, pos, keys, when, mass)
    top = jnp.max(logit, axis=-1)
    p = jnp.where(logit > _NEVER, jnp.exp(logit - top[..., None]), 0.0)
    values = jnp.where((mass > 0)[..., None], values, 0)  # an empty slot may hold NaN, and 0·NaN is NaN
    exact = precision(values.dtype)
    out = jnp.einsum(
        "bkxs,bksd->bkxd", p.astype(values.dtype), values, precision=exact, preferred_element_type=jnp.float32
    )
    return top, p.sum(-1), out


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
    batch, length, n_heads, group, size = q.shape
    rows = jnp.moveaxis(q, 1, 3).reshape(batch, n_heads, group * length, size)
    when_q = jnp.tile(pos, (1, group))  # [B X], X = G·T
    slots = (keys, values, when, mass)
    _, total, out = _in_blocks(layer, rows, when_q, slots)
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    out = out.reshape(batch, n_heads, group, length, size)
    return jnp.moveaxis(out, 3, 1).astype(q.dtype)


def _in_blocks(layer: Layer, q: Array, pos: Array, slots: tuple) -> tuple:
    """Joins `_partial` over blocks of slots, as far as slots are occupied."""
    size = slots[3].shape[2]
    block = min(_BLOCK, size)
    used = jnp.max(jnp.where(slots[3] > 0, jnp.arange(1, size + 1), 0))

    def step(i, carry):
        top, total, out = carry
        start = jnp.minimum(i * block, size - block)  # the last block may overlap the one before
        part = [jax.lax.dynamic_slice_in_dim(x, start, block, axis=2) for x in slots]
        part[3] = jnp.where(start + jnp.arange(block) >= i * block, part[3], 0.0)
        new_top, new_total, new_out = _partial(layer, q, pos, *part)
        joint = jnp.maximum(top, new_top)
        old, new = jnp.exp(top - joint), jnp.exp(new_top - joint)
        return joint, total * old + new_total * new, out * old[..., None] + new_out * new[..., None]

    shape = q.shape[:3]
    empty = (jnp.full(shape, _NEVER), jnp.zeros(shape), jnp.zeros((*shape, q.shape[3])))
    return jax.lax.fori_loop(0, (used + block - 1) // block, step, empty)
