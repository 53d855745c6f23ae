"""Row writes in Pallas Triton: a program writes a tile of one head's tokens to every store, in place.

XLA makes a kernel of each store's scatter and of each rotation, which for one token takes as long as this one
takes for all.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.append_rows import reference
from pallas_kernels.attention import starts
from pallas_kernels.backend import barrier, gpu_call, pl, program_id, triton
from pallas_kernels.rows_gpu import lanes, rotated

__all__ = ["run"]

_TILE = 16


def run(stores, rows, fill, seen, order, turn, *, slots: tuple[int, ...]):
    """Returns what `reference.run` returns; its derivatives are the reference's."""
    return _run(stores, rows, fill, seen, order, turn, slots)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def _run(stores, rows, fill, seen, order, turn, slots: tuple[int, ...]):
    flat, tree = jax.tree.flatten(stores)
    vectors, vectors_tree = jax.tree.flatten(None if turn is None else turn.vectors)
    (batch, length), n_stores = order.shape, len(flat)
    tile = min(_TILE, pl.next_power_of_2(length))
    counts = length <= tile  # else some program may still read what another has counted
    written = [*flat, fill, seen] if counts else flat
    narrow, packed, at = _packed(jax.tree.leaves(rows), vectors, together=counts)
    heads = jnp.asarray(np.stack([starts(slots)[:-1], slots], axis=1), jnp.int32)
    turns = (False,) * n_stores if turn is None else turn.stores
    n_turned = sum(x.shape[3] for x in vectors)
    out = gpu_call(
        functools.partial(_write, at=at, turns=turns, n_vectors=len(vectors), tile=tile),
        flat, fill, seen, narrow, packed, order, heads, None if turn is None else (turn.cos, turn.sin),
        grid=(batch, len(slots), pl.cdiv(length, tile) * (1 + n_turned)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*written, *vectors)],
        aliases={i: i for i in range(len(written))}, name="append_rows",
    )  # fmt: skip
    after = out[n_stores : len(written)] if counts else reference.counted(fill, seen, order, slots)
    turned = None if turn is None else vectors_tree.unflatten(out[len(written) :])
    return tree.unflatten(out[:n_stores]), *after, turned


def _packed(rows, vectors, together: bool) -> tuple[list, list, tuple]:
    """Returns rows without channels; those with, and vectors, as [B T K N D]; and where each of all is.

    together: in one array, for XLA to make by one kernel, whatever makes them. Else nothing is copied.

    Raises:
        NotImplementedError: for rows and vectors of several types.
    """
    narrow, wide, at, n_before = [], [], [], 0
    for x in (*rows, *vectors):
        if x.ndim == 3:
            at.append((len(narrow), None))
            narrow.append(x)
            continue
        at.append((0, n_before) if together else (len(wide), 0))
        wide.append(x if x.ndim == 5 else jnp.swapaxes(x, 1, 2)[:, :, :, None])
        n_before += wide[-1].shape[3]
    if len({x.dtype for x in wide}) > 1:
        raise NotImplementedError(f"the kernel takes rows of one type, got {[str(x.dtype) for x in wide]}")
    return narrow, [jnp.concatenate(wide, axis=3)] if together and wide else wide, tuple(at)


@_run.defjvp
def _derivative(slots: tuple[int, ...], values, changes):
    """A kernel that writes in place has no derivative."""
    return jax.jvp(functools.partial(reference.run, slots=slots), values, changes)


def _write(
    store_refs,  # [B R ...] each
    fill_ref,  # [B K]
    seen_ref,  # [B]
    narrow_refs,  # [B K T] of each store without channels
    packed_refs,  # [B T K N D] of the others, and the vectors
    order_ref,  # [B T]
    heads_ref,  # [K 2] first packed row, capacity
    angle_refs,  # cosines and sines [B T D/2], or None
    *out_refs,  # the stores, maybe fill and seen, and the vectors
    at: tuple,  # where the row of each store and each vector is: in which ref, and from where on in N
    turns: tuple[bool, ...],  # of each store
    n_vectors: int,
    tile: int,
):
    """Writes a tile of one head's tokens, and counts them if all are of this tile; or turns a vector of each.

    A program for each vector, since a program waits for what it loads before it stores anything.
    """
    n_stores, n_written = len(store_refs), len(out_refs) - n_vectors
    batch, head = program_id(0), program_id(1)
    n_parts = 1 + sum(ref.shape[3] for ref in out_refs[n_written:])
    part, token = program_id(2) % n_parts, program_id(2) // n_parts * tile + jnp.arange(tile)
    here = token < order_ref.shape[1]
    angles = None if angle_refs is None else [_angles(ref, batch, token, here) for ref in angle_refs]

    @pl.when(part == 0)
    def _store():
        order = triton.load(order_ref.at[batch, token], mask=here, other=-1)
        slot = fill_ref[batch, head] + order
        alive = (order >= 0) & (slot < heads_ref[head, 1])
        moves = []
        for i, (out_ref, turn) in enumerate(zip(out_refs, turns, strict=False)):
            # Interpreted, what is masked is written back as it was, over what others wrote: not inside, then.
            to = jnp.where(alive, heads_ref[head, 0] + slot, out_ref.shape[1])
            which, first = at[i]
            if out_ref.ndim == 2:
                source = (narrow_refs[which], (batch, head, token))
            else:
                source = (packed_refs[which], (batch, token, head, first))
            moves.append(_moved(source, (out_ref, (batch, to)), alive, angles if turn else None))
        barrier()  # all is loaded, the counts that others would read anew too, before anything is stored
        _put(itertools.chain(*moves))
        if counted := out_refs[n_stores:n_written]:
            _count((fill_ref, seen_ref, heads_ref), counted, batch, head, order)

    before = 1
    for (which, first), out_ref in zip(at[n_stores:], out_refs[n_written:], strict=True):
        g = part - before
        before += out_ref.shape[3]

        @pl.when((g >= 0) & (g < out_ref.shape[3]))
        def _turn(g=g, source_ref=packed_refs[which], first=first, out_ref=out_ref):
            to = jnp.where(here, token, out_ref.shape[1])
            source = (source_ref, (batch, token, head, first + g))
            _put(_moved(source, (out_ref, (batch, to, head, g)), here, angles))


def _count(refs, counted, batch, head, order) -> None:
    """Stores the next free slot of a head; and what its row has taken, for which the first head does it."""
    fill_ref, seen_ref, heads_ref = refs
    taken = jnp.sum((order >= 0).astype(jnp.int32), axis=0)
    counted[0][batch, head] = jnp.minimum(fill_ref[batch, head] + taken, heads_ref[head, 1])
    own = jnp.arange(1) + jnp.where(head == 0, batch, seen_ref.shape[0])
    triton.store(counted[1].at[own], seen_ref[batch] + taken + 0 * own, mask=own < seen_ref.shape[0])


def _angles(ref, batch, at, here):
    """Loads cosines or sines [P E] of tokens; E pads D/2."""
    channel = jnp.arange(lanes(ref.shape[2]))
    mask = here[:, None] & (channel < ref.shape[2])[None, :]
    return triton.load(ref.at[batch, at[:, None], channel[None, :]], mask=mask, other=0)


def _moved(source, target, mask, angles) -> list[tuple]:
    """Loads rows [P] or [P D], turned by any angles: where parts of them go, the parts, masks.

    source, target: a ref, and indices of all its axes but that of the channels.
    """
    (ref, place), (out_ref, to) = source, target
    if ref.ndim == len(place):
        return [(out_ref.at[to], triton.load(ref.at[place], mask=mask, other=0), mask)]
    n_parts = 1 if angles is None else 2
    width = ref.shape[-1] // n_parts
    channel = jnp.arange(lanes(width))
    inside = mask[:, None] & (channel < width)[None, :]

    def part(where, i):  # of the channels, whole or a half
        where = [x[:, None] if getattr(x, "ndim", 0) else x for x in where]
        return (*where, (i * width + channel)[None, :])

    parts = [triton.load(ref.at[part(place, i)], mask=inside, other=0) for i in range(n_parts)]
    if angles is not None:
        parts = rotated([x.astype(jnp.float32) for x in parts], *angles)
    return [(out_ref.at[part(to, i)], x.astype(out_ref.dtype), inside) for i, x in enumerate(parts)]


def _put(moved) -> None:
    """Stores what `_moved` loaded."""
    for where, x, mask in moved:
        triton.store(where, x, mask=mask)
