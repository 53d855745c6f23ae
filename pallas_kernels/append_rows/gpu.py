"""Row writes in Pallas Triton: a program writes a tile of one head's tokens to every store, in place.

XLA makes a kernel of each store's scatter, which for one token takes as long as this one takes for all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.append_rows import reference
from pallas_kernels.attention import starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.rows_gpu import lanes

__all__ = ["run"]

_TILE = 16


def run(stores, rows, fill, seen, order, *, slots: tuple[int, ...]):
    """Returns what `reference.run` returns; its derivatives are the reference's."""
    return _run(stores, rows, fill, seen, order, slots)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _run(stores, rows, fill, seen, order, slots: tuple[int, ...]):
    flat, tree = jax.tree.flatten(stores)
    (batch, length), n_stores = order.shape, len(flat)
    tile = min(_TILE, pl.next_power_of_2(length))
    counts = length <= tile  # else some program may still read what another has counted
    written = [*flat, fill, seen] if counts else flat
    heads = jnp.asarray(np.stack([starts(slots)[:-1], slots], axis=1), jnp.int32)
    out = gpu_call(
        functools.partial(_write, n_stores=n_stores, tile=tile),
        *flat, fill, seen, *jax.tree.leaves(rows), order, heads,
        grid=(batch, len(slots), pl.cdiv(length, tile)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written],
        aliases={i: i for i in range(len(written))}, name="append_rows",
    )  # fmt: skip
    after = out[n_stores:] if counts else reference.counted(fill, seen, order, slots)
    return tree.unflatten(out[:n_stores]), *after


@_run.defjvp
def _derivative(slots: tuple[int, ...], values, changes):
    """A kernel that writes in place has no derivative."""
    return jax.jvp(functools.partial(reference.run, slots=slots), values, changes)


def _write(*refs, n_stores: int, tile: int):
    """Writes one tile of one head's tokens, and counts them if all are of this tile.

    refs: the stores, fill [B K], seen [B]; rows [B K T ...] of each store; order [B T]; heads [K 2], first
    packed row and capacity; then the outputs: the stores [B R ...], and maybe fill and seen.
    """
    fill_ref, seen_ref = refs[n_stores : n_stores + 2]
    rows_refs, (order_ref, heads_ref) = refs[n_stores + 2 :][:n_stores], refs[2 * n_stores + 2 :][:2]
    out_refs, counted = refs[2 * n_stores + 4 :][:n_stores], refs[3 * n_stores + 4 :]
    batch, head = program_id(0), program_id(1)
    at = program_id(2) * tile + jnp.arange(tile)
    order = triton.load(order_ref.at[batch, at], mask=at < order_ref.shape[1], other=-1)
    slot = fill_ref[batch, head] + order
    alive = (order >= 0) & (slot < heads_ref[head, 1])
    for rows_ref, out_ref in zip(rows_refs, out_refs, strict=True):
        # Interpreted, what is masked is written back as it was, over what others wrote: not inside, then.
        to = jnp.where(alive, heads_ref[head, 0] + slot, out_ref.shape[1])
        if out_ref.ndim == 2:
            new = triton.load(rows_ref.at[batch, head, at], mask=alive, other=0)
            triton.store(out_ref.at[batch, to], new, mask=alive)
            continue
        channel = jnp.arange(lanes(out_ref.shape[2]))
        mask = alive[:, None] & (channel < out_ref.shape[2])[None, :]
        new = triton.load(rows_ref.at[batch, head, at[:, None], channel[None, :]], mask=mask, other=0)
        triton.store(out_ref.at[batch, to[:, None], channel[None, :]], new, mask=mask)
    if counted:
        taken = jnp.sum((order >= 0).astype(jnp.int32), axis=0)
        counted[0][batch, head] = jnp.minimum(fill_ref[batch, head] + taken, heads_ref[head, 1])
        own = jnp.arange(1) + jnp.where(head == 0, batch, seen_ref.shape[0])  # one head counts for its row
        triton.store(counted[1].at[own], seen_ref[batch] + taken + 0 * own, mask=own < seen_ref.shape[0])
