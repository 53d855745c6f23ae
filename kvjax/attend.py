"""Attends over a KV state: one query per row by our kernels, a prompt's by a library's.

    out_t = Σ_s softmax_s(scale·q_t·k_s + log mass_s) v_s     over slots with pos_s <= pos_t

Every head's slots are read in full, or, with a `Selection`, only those it lists.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax import storage, tiers
from kvjax.cache import KV, extent, runs, starts, take, view
from kvjax.prefill_attention import attend_prompt, logits
from kvjax.rope import rotate, rotate_rows
from kvjax.shapes import Leaf, Positions, Queries
from pallas_kernels import AttentionForm, decode_attention, join, sparse_decode_attention

__all__ = ["Selection", "attend", "attend_rotated", "held", "listed", "weights"]


@struct.dataclass
class Selection:
    """Which blocks of slots each KV head reads: indices with a static length, -1 = none."""

    idx: Leaf  # [B K N] int32
    block: int = struct.field(pytree_node=False)  # slots per block, P


def held(kv: KV, pos: Positions, selection: Selection | None) -> tuple[KV, KV, Selection | None]:
    """Brings what is to be read from the host.

    Returns: the state; and one on the device, with a selection of it, that attention can read instead.
    Without a tier these are what was given.

    Raises:
        ValueError: for blocks of a selection that are no part of the tier's.
    """
    if kv.tier is None:
        return kv, kv, selection
    if selection is None:
        k, v = tiers.whole(kv.tier, kv.slots)
        return kv, kv.replace(k=k, v=v, tier=None), None
    block, n_heads = kv.tier.block, len(kv.slots)
    per, rest = divmod(block, selection.block)
    if rest:
        raise ValueError(f"a tier's block holds whole ones of a selection, got {block=}, {selection.block=}")
    idx = jnp.where((pos >= 0)[..., None], selection.idx, -1)
    tier, line = tiers.bring(kv.tier, jnp.where(idx >= 0, idx // per, -1), kv.seen, kv.slots)
    size = tier.k.shape[1] // n_heads
    slot = tier.held[..., None] * block + jnp.arange(block)  # [B K C P]
    inside = (tier.held >= 0)[..., None] & (slot < jnp.asarray(kv.slots)[:, None, None])
    row = jnp.where(inside, slot + starts(kv.slots)[:, None, None], -1).reshape(len(slot), -1)
    mass = (inside & (slot < kv.fill[..., None, None])).astype(kv.mass.dtype).reshape(row.shape)
    here = kv.replace(
        k=tier.k, v=tier.v, pos=take(kv.pos, row), mass=mass, slots=(size,) * n_heads, tier=None, aux=None
    )
    at = jnp.where(idx >= 0, line * per + idx % per, -1)
    return kv.replace(tier=tier), here, selection.replace(idx=at)


def attend(
    kv: KV, q: Queries, pos: Positions, selection: Selection | None = None
) -> Float[Array, "B T K G D"]:
    """Returns attention of T un-rotated queries over the slots; a row with no slot gives 0.

    Cost and padding as of `attend_rotated`.
    """
    return attend_rotated(kv, _rotate_queries(kv, q, pos), pos, selection)


def attend_rotated(
    kv: KV, q: Queries, pos: Positions, selection: Selection | None = None
) -> Float[Array, "B T K G D"]:
    """Returns attention of T rotated queries over the slots; a row with no slot gives 0.

    One query per row is that of the newest token, so that no slot is later: it runs in the
    decode kernels. A row with pos < 0 is padding and gives 0.

    Cost: reads K and V of every slot once, 2·B·R·D elements (of the selected slots only, with a
    selection), and 4·B·T·G·R·D FLOPs.
    """
    if q.shape[1] == 1:
        return _attend_newest(kv, q[:, 0], pos, selection)[:, None]
    if selection is not None:
        return attend_prompt(q, *_selected(kv, selection), pos, layer=kv.layer)
    keys, values = storage.read(kv.k), storage.read(kv.v)
    out = []
    for run in runs(kv.slots):
        part = (view(keys, run), view(values, run), view(kv.pos, run), view(kv.mass, run))
        heads = q[:, :, run.head : run.head + run.n]
        out.append(attend_prompt(heads, *_with_rotation(kv, part), pos, layer=kv.layer))
    return jnp.concatenate(out, axis=2)


def _attend_newest(kv: KV, q: Float[Array, "B K G D"], pos: Positions, selection: Selection | None) -> Array:
    """Attends with one rotated query per row, by kernels that read the store as it is."""
    mass = kv.mass
    if kv.layer.window is not None:
        mass = jnp.where(kv.pos > pos - kv.layer.window, mass, 0.0)
    if isinstance(kv.k, storage.Quantized):
        return _attend_quantized(kv, q, mass, pos, selection)
    keys = kv.k if kv.rotated else rotate_rows(kv.k, kv.pos, kv.layer.rope)
    return _kernel(kv, q, (keys, kv.v), mass, pos, selection, lse=False)


def _kernel(
    kv: KV, q: Array, rows: tuple, mass: Array, pos: Positions, selection: Selection | None, lse: bool
):
    """Calls the decode kernel, dense or sparse."""
    form = AttentionForm(kv.slots, kv.layer.scale, kv.layer.softcap, lse, holes=selection is None)
    if selection is None:
        # Of masses that are not the state's, that of a head's last slot says nothing.
        length = kv.fill if mass is kv.mass else extent(kv)
        return decode_attention(q, *rows, mass, length, pos[:, 0], form=form)
    idx = jnp.where(pos[..., None] >= 0, selection.idx, -1)
    return sparse_decode_attention(q, *rows, mass, idx, form=form, block=selection.block)


def _attend_quantized(kv: KV, q: Array, mass: Array, pos: Positions, selection: Selection | None) -> Array:
    """Attends over the codes and over the rings of recent rows, which override theirs, and joins the two."""
    slot = kv.k.slot  # [B K W], the same for keys and values: they are written together
    recent = (store.recent.reshape(q.shape[0], -1, q.shape[-1]) for store in (kv.k, kv.v))
    batch, n_rows = jnp.arange(q.shape[0])[:, None, None], mass.shape[1]
    ring_mass = jnp.where(slot < n_rows, mass[batch, jnp.minimum(slot, n_rows - 1)], 0.0)
    if selection is not None:
        block = (slot - starts(kv.slots)[None, :, None]) // selection.block
        chosen = (block[..., None] == selection.idx[:, :, None]) & (selection.idx[:, :, None] >= 0)
        ring_mass = jnp.where(chosen.any(-1), ring_mass, 0.0)
    ring_mass = jnp.where(pos[..., None] >= 0, ring_mass, 0.0).reshape(q.shape[0], -1)
    codes = _kernel(
        kv, q, (kv.k.as_codes(), kv.v.as_codes()), mass.at[batch, slot].set(0.0, mode="drop"), pos,
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
        p = jax.nn.softmax(logits(kv.layer, rows, jnp.tile(pos, (1, group)), key, when, mass), axis=-1)
        p = jnp.where(jnp.tile(pos >= 0, (1, group))[:, None, :, None], p, 0.0)
        out.append(jnp.moveaxis(p, 1, 2).reshape(batch, group, length, -1))
    return jnp.concatenate(out, axis=-1)


def _rotate_queries(kv: KV, q: Array, pos: Array) -> Array:
    return rotate(q, jnp.broadcast_to(pos[:, :, None, None], q.shape[:4]), kv.layer.rope)


def _with_rotation(kv: KV, part: tuple) -> tuple:
    """Rotates keys that are stored un-rotated."""
    keys, values, when, mass = part
    return (keys if kv.rotated else rotate(keys, when, kv.layer.rope)), values, when, mass


def listed(kv: KV, selection: Selection) -> Int[Array, "B K Q"]:
    """Returns the packed rows of the slots that a selection lists, occupied or not; -1 = none."""
    slot = selection.idx[..., None] * selection.block + jnp.arange(selection.block)  # [B K N P]
    inside = (selection.idx[..., None] >= 0) & (slot < jnp.asarray(kv.slots)[None, :, None, None])
    row = jnp.where(inside, slot + starts(kv.slots)[None, :, None, None], -1)
    return row.reshape(*row.shape[:2], -1)


def _selected(kv: KV, selection: Selection) -> tuple:
    """Gathers the selected slots as keys, values [B K NP D], positions and masses [B K NP]."""
    row = listed(kv, selection)
    shape, row = row.shape, row.reshape(row.shape[0], -1)
    rows = (take(x, row) for x in (storage.read(kv.k), storage.read(kv.v), kv.pos, kv.mass))
    part = tuple(x.reshape(*shape, *x.shape[2:]) for x in rows)
    return _with_rotation(kv, part)
