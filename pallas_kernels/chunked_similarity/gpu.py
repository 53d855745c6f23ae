"""Chunked bipartite matching in Pallas Triton.

A program takes a tile of A sources of one chunk and goes through its destinations in tiles of C:
for chunks of up to 256 slots both are the whole chunk, and K is read once. The other tiles of a
larger chunk find its keys in L2. Rows are read where they lie, sources around destinations.
D2 pads the channels to a power of 2.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.attention import starts
from pallas_kernels.backend import gpu_call, pl, program_id, triton
from pallas_kernels.instructions import multiply_add

__all__ = ["Settings", "run"]

_TILE_BYTES = 2**15  # of keys: two tiles fit the shared memory of every GPU


@dataclass(frozen=True)
class Settings:
    """sources, destinations: most per tile."""

    sources: int = 128
    destinations: int = 128
    warps: int = 4


def run(k, mass, *, slots, chunk, stride, kind):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types or head sizes that the kernel does not take.
    """
    if k.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"the kernel takes float32, bfloat16 and float16, got {k.dtype=}: convert it"
        )
    if k.shape[2] > 256:
        raise NotImplementedError(
            f"the kernel takes head sizes up to 256, got D={k.shape[2]}: use the reference"
        )
    chosen = tuning.settings(
        "chunked_similarity",
        Settings(warps=4 if chunk > 128 else 1),
        dtype=str(k.dtype),
        head_dim=k.shape[2],
        chunk=chunk,
        stride=stride,
    )
    n_destinations = chunk // stride
    most = 32 if k.dtype == jnp.float32 else _TILE_BYTES // (k.dtype.itemsize * _padded(k.shape[2]))
    sources, destinations = (
        min(_padded(n), most, limit)
        for n, limit in ((chunk - n_destinations, chosen.sources), (n_destinations, chosen.destinations))
    )
    items = _items(slots, chunk, stride, sources)
    return tuple(
        gpu_call(
            functools.partial(
                _match, stride=stride, kind=kind, n_sources=sources, n_destinations=destinations,
                n_tiles=-(-n_destinations // destinations),
            ),
            jnp.asarray(items), k, mass,
            grid=(len(items), k.shape[0]),
            out_shape=(
                jax.ShapeDtypeStruct(mass.shape, jnp.int32),
                jax.ShapeDtypeStruct(mass.shape, jnp.float32),
            ),
            warps=chosen.warps, stages=1, name="chunked_similarity",
        )
    )  # fmt: skip


def _padded(n: int) -> int:
    return max(16, pl.next_power_of_2(n))


def _items(slots: tuple[int, ...], chunk: int, stride: int, tile: int) -> np.ndarray:
    """Returns the work [I 4]: the chunk's packed row, its first slot, its slots, the first source."""
    return np.array(
        [
            (first + at, at, min(chunk, size - at), source)
            for first, size in zip(starts(slots), slots, strict=False)
            for at in range(0, size, chunk)
            for source in range(0, max(1, min(chunk, size - at) - min(chunk, size - at) // stride), tile)
        ],
        np.int32,
    )


def _dot(a, b):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _inverse_norm(square):
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _match(
    items_ref,  # [I 4] the chunk's row, first slot and slots; first source
    k_ref,  # [B R D]
    mass_ref,  # [B R]
    best_ref,  # [B R]
    similarity_ref,  # [B R]
    *,
    stride: int,
    kind: str,
    n_sources: int,  # A
    n_destinations: int,  # C
    n_tiles: int,  # of destinations, in a whole chunk
):
    """Matches one tile of a chunk's sources."""
    item, batch = program_id(0), program_id(1)
    row, slot, n, first = (items_ref[item, i] for i in range(4))
    size = k_ref.shape[2]
    d = jnp.arange(_padded(size))

    def load(place):  # keys [X D2] at places in the chunk, which of them live, and their squares [X]
        alive = triton.load(mass_ref.at[batch, row + place], mask=place < n, other=0.0) > 0
        mask = alive[:, None] & (d < size)[None, :]
        x = triton.load(k_ref.at[batch, (row + place)[:, None], d[None, :]], mask=mask, other=0)
        x32 = x.astype(jnp.float32)
        return x, alive, jnp.sum(x32 * x32, axis=1)

    nth = first + jnp.arange(n_sources)
    source = jax.lax.div(nth, stride - 1) * stride + jax.lax.rem(nth, stride - 1)
    a, a_alive, a_square = load(source)

    def step(i, carry):
        top, which = carry
        first_place = i * n_destinations * stride + stride - 1
        place = first_place + jnp.arange(n_destinations) * stride
        b, alive, square = load(place)
        dead = jnp.where(alive, 0.0, -jnp.inf)
        factor, term = {
            "cosine": (_inverse_norm(square), dead),
            "l2": (jnp.full(square.shape, 2.0), dead - square),
            "dot": (jnp.ones(square.shape), dead),
        }[kind]
        # [A C]; what depends on the source alone comes last
        value = multiply_add(_dot(a, b.T), factor[None, :], term[None, :])
        new, at = jnp.max(value, axis=1), first_place + jnp.argmax(value, axis=1) * stride
        mask = (place < n) & (first == 0)  # one program writes that destinations have none
        triton.store(best_ref.at[batch, row + place], jnp.full(place.shape, -1), mask=mask)
        triton.store(similarity_ref.at[batch, row + place], jnp.full(place.shape, -jnp.inf), mask=mask)
        return jnp.maximum(top, new), jnp.where(new > top, at, which)

    carry = (jnp.full((n_sources,), -jnp.inf), jnp.full((n_sources,), -1))
    top, which = step(0, carry) if n_tiles == 1 else jax.lax.fori_loop(0, n_tiles, step, carry)
    found = a_alive & (top > -jnp.inf)
    if kind == "cosine":
        top = top * _inverse_norm(a_square)
    elif kind == "l2":
        top = jnp.minimum(top - a_square, 0.0)
    triton.store(best_ref.at[batch, row + source], jnp.where(found, slot + which, -1), mask=source < n)
    triton.store(similarity_ref.at[batch, row + source], jnp.where(found, top, -jnp.inf), mask=source < n)
