"""Chunked bipartite matching in Pallas Mosaic.

A chunk is multiplied with itself in tiles of T slots, destinations along sublanes and sources
along lanes, and what is no destination is masked: taking every s-th row apart costs more than the
products it saves. A step of the grid takes several chunks of one head.

Heads begin at any multiple of g rows: K is seen as [B R/g g D], where a block may begin at any
place of the second axis. Where g would be no whole tile, K is first copied, chunk by chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import pl, pltpu, tpu_call

__all__ = ["run"]

_TILE = 256  # T at most
_STEP_BYTES = 2**19  # of keys, per step of the grid
_MOST_BYTES = 2**22  # of one chunk


def run(k, mass, *, slots, chunk, stride, kind):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take, and for chunks that are too large.
    """
    if k.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"the kernel takes float32, bfloat16 and float16, got {k.dtype=}: convert it"
        )
    if k.dtype == jnp.float16:
        k = k.astype(jnp.float32)  # Mosaic has no float16
    batch, _, size = k.shape
    padded = -(-chunk // 16) * 16
    padded = padded if padded <= _TILE else -(-chunk // _TILE) * _TILE
    tile = min(padded, _TILE)
    if (chunk_bytes := padded * max(128, size) * k.dtype.itemsize) > _MOST_BYTES:
        raise NotImplementedError(
            f"the kernel takes chunks of up to {_MOST_BYTES} bytes, got {chunk_bytes}: lower {chunk=}"
        )
    grain = math.gcd(tile, *slots)  # g
    held = slots
    if padded != chunk or grain % 16 or k.shape[1] < padded:
        chunks = [_chunks(part, chunk, padded, 1, 0) for part in _heads(k, slots)]
        k, grain = jnp.concatenate(chunks, axis=1).reshape(batch, -1, size), tile
        held = tuple(-(-s // chunk) * padded for s in slots)
    rows = k.shape[1]
    n = max(1, min(_STEP_BYTES // chunk_bytes, max(held) // padded, rows // padded))  # chunks per step
    items, shifts = _items(held, padded, n, rows), _shifts(held, padded, rows)
    place = np.concatenate([np.arange(size) % chunk % stride for size in slots])
    sign = np.where(place == stride - 1, -1.0, 1.0).astype(np.float32)
    roles = jnp.where(mass > 0, sign, 0.0)  # of a slot: 1 source, -1 destination, 0 neither
    parts = zip(_heads(roles, slots), shifts, strict=True)
    roles = jnp.concatenate([_chunks(part, chunk, padded, n, shift) for part, shift in parts], axis=1)
    small = pl.BlockSpec((1, 1, n, padded), lambda b, i, *_: (b, i, 0, 0))
    out = tpu_call(
        functools.partial(_match, chunk=chunk, tile=tile, kind=kind),
        jnp.asarray(items // [[grain], [grain], [1], [1]]), k.reshape(batch, -1, grain, size), roles,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, items.shape[1]),
            in_specs=[
                pl.BlockSpec(
                    tuple(pl.Element(m) for m in (1, n * padded // grain, grain, size)),
                    lambda b, i, items: (b, items[0, i], 0, 0),
                ),
                small,
            ],
            out_specs=[small, small],
        ),
        out_shape=tuple(jax.ShapeDtypeStruct(roles.shape, t) for t in (jnp.int32, jnp.float32)),
        semantics=("parallel", "parallel"), vmem_bytes=14 * 2**20, name="chunked_similarity",
    )  # fmt: skip
    return tuple(_packed(x, slots, chunk, shifts) for x in out)


def _items(held: tuple[int, ...], chunk: int, n: int, rows: int) -> np.ndarray:
    """Returns the work [4 I]: first row to read, row of the first chunk from there, first chunk, chunks."""
    items, row = [], 0
    for size in held:
        for at in range(0, size, n * chunk):
            first = min(row + at, rows - n * chunk)
            items.append((first, row + at - first, at // chunk, -(-min(n * chunk, size - at) // chunk)))
        row += size
    return np.array(items, np.int32).T


def _shifts(held: tuple[int, ...], chunk: int, rows: int) -> list[int]:
    """Returns how many rows too early each head's last chunk is read, so as to end within the array."""
    starts_of_last = [int(end) - size % chunk for end, size in zip(np.cumsum(held), held, strict=True)]
    return [
        max(0, start + chunk - rows) if size % chunk else 0
        for start, size in zip(starts_of_last, held, strict=True)
    ]


def _heads(x, slots: tuple[int, ...]):
    """Splits packed rows into heads."""
    return jnp.split(x, np.cumsum(slots)[:-1].tolist(), axis=1)


def _chunks(x, chunk: int, padded: int, n: int, shift: int):
    """Returns the rows of a head [B S ...] as chunks in groups of n, [B I n C ...], filled with 0.

    shift: rows of 0 that the last chunk begins with.
    """
    tail = ((0, 0),) * (x.ndim - 2)
    whole = x.shape[1] - x.shape[1] % chunk
    last = jnp.pad(x[:, whole:], ((0, 0), (shift, 0), *tail))
    x = jnp.concatenate([x[:, :whole], last], axis=1)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % (n * chunk)), *tail))
    x = x.reshape(x.shape[0], -1, n, chunk, *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padded - chunk), *tail))


def _packed(x, slots: tuple[int, ...], chunk: int, shifts: list[int]):
    """Returns chunks [B I n C] as packed rows [B R]: what `_chunks` did, undone."""
    x, parts, item = x[..., :chunk], [], 0
    span = x.shape[2] * chunk
    for size, shift in zip(slots, shifts, strict=True):
        n = -(-size // span)
        part, whole = x[:, item : item + n].reshape(x.shape[0], -1), size - size % chunk
        parts += [part[:, :whole], part[:, whole + shift : size + shift]]
        item += n
    return jnp.concatenate(parts, axis=1)


def _match(
    items_ref,  # [4 I] in SMEM: first row to read and of the first chunk (in units of g), first chunk, chunks
    k_ref,  # [1 n·C/g g D]
    role_ref,  # [1 1 n C]
    best_ref,  # [1 1 n C]
    similarity_ref,  # [1 1 n C]
    *,
    chunk: int,  # slots of a chunk; C pads them
    tile: int,  # T
    kind: str,
):
    """Matches the chunks of one step. Rows of no role may hold anything."""
    item = pl.program_id(1)
    _, rows, grain, size = k_ref.shape
    padded = role_ref.shape[3]
    span, n_tiles = padded // grain, padded // tile
    down, across = (jax.lax.broadcasted_iota(jnp.int32, (tile, tile), axis) for axis in (0, 1))

    def upright(x):  # [1 T] to [T 1], by the diagonal
        return jnp.max(jnp.where(down == across, x, -jnp.inf), axis=1, keepdims=True)

    def flat(x):  # [T 1] to [1 T]
        return jnp.max(jnp.where(down == across, x, -jnp.inf), axis=0, keepdims=True)

    def match(j):
        wanted = items_ref[1, item] + j * span
        first = jnp.minimum(wanted, rows - span)
        slot = (items_ref[2, item] + j) * chunk - (wanted - first) * grain  # of the first row read

        def load(i):  # keys [T D] of tile i, their squares [T 1] and roles [1 T]
            x = k_ref[0, pl.ds(first + i * (tile // grain), tile // grain)].reshape(tile, size)
            x32 = x.astype(jnp.float32)
            return x, jnp.sum(x32 * x32, axis=1, keepdims=True), role_ref[place(i)]

        def place(i):
            return 0, 0, pl.ds(j, 1), pl.ds(i if isinstance(i, int) else pl.multiple_of(i * tile, 128), tile)

        def sources(i):
            a, a_square, a_role = load(i)

            def destinations(t, carry):
                top, which = carry
                b, square, role = load(t)
                value = _dot(b, a)  # [T T]; what depends on the source alone comes last
                if kind == "cosine":
                    value = value * _inverse_norm(square)
                elif kind == "l2":
                    value = 2 * value - square
                value = jnp.where(upright(role) < 0, value, -jnp.inf)
                new = jnp.max(value, axis=0, keepdims=True)
                at = jnp.min(jnp.where(value == new, t * tile + down, padded), axis=0, keepdims=True)
                return jnp.maximum(top, new), jnp.where(new > top, at, which)

            none = (jnp.full((1, tile), -jnp.inf), jnp.zeros((1, tile), jnp.int32))
            top, which = _loop(n_tiles, destinations, none)
            found = (a_role > 0) & (top > -jnp.inf)
            if kind == "cosine":
                top = top * _inverse_norm(flat(a_square))
            elif kind == "l2":
                top = jnp.minimum(top - flat(a_square), 0.0)
            best_ref[place(i)] = jnp.where(found, slot + which, -1)
            similarity_ref[place(i)] = jnp.where(found, top, -jnp.inf)

        _loop(n_tiles, lambda i, _: sources(i), None)

    jax.lax.fori_loop(0, items_ref[3, item], lambda j, _: match(j), None)


def _loop(n: int, step, carry):
    """Loops n times; once is no loop, and its index static."""
    return step(0, carry) if n == 1 else jax.lax.fori_loop(0, n, step, carry)


def _inverse_norm(square):
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _dot(a, b):
    """Returns a·bᵀ."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    over = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, over, precision=exact, preferred_element_type=jnp.float32)
