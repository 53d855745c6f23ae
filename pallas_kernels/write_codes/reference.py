"""Writes rows by XLA: the specification of the kernel."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import block_rows, code_blocks, encode

__all__ = ["run"]


def run(stores, rings, rows, idx, mass, *, slots: tuple[int, ...]):
    """Returns the stores and the rings."""
    rings = tuple(_remembered(ring, row, idx, sum(slots)) for ring, row in zip(rings, rows, strict=True))
    done = (
        _row(store, row, idx) if store.block is None else _block(store, ring, idx, mass, slots)
        for store, ring, row in zip(stores, rings, rows, strict=True)
    )
    return tuple(done), rings


def _remembered(ring, row, idx, n_rows: int):
    """Returns the ring with one new row per head, without an older one of the same slot."""
    window, idx = ring.slot.shape[2], idx[..., None]
    here = (jnp.arange(window) == ring.turn[..., None]) & (idx < n_rows)  # [B K W]
    slot = jnp.where(here, idx, jnp.where(ring.slot == idx, n_rows, ring.slot))
    rows = jnp.where(here[..., None], row[:, :, None], ring.rows)
    turn = jnp.where(idx[..., 0] < n_rows, (ring.turn + 1) % window, ring.turn)
    return dataclasses.replace(ring, rows=rows, slot=slot, turn=turn)


def _row(store, row, idx):
    """Writes the codes of one row per head."""
    batch = jnp.arange(len(idx))[:, None]
    codes, scale, zero = encode(row, store.bits, axis=-1)
    return dataclasses.replace(
        store,
        codes=store.codes.at[batch, idx].set(codes, mode="drop"),
        scale=store.scale.at[batch, idx].set(scale, mode="drop"),
        zero=store.zero.at[batch, idx].set(zero, mode="drop"),
    )


def _block(store, ring, idx, mass, slots: tuple[int, ...]):
    """Writes the codes of the block of each head that holds packed row idx."""
    n_rows, n_blocks, batch = sum(slots), store.scale.shape[1], jnp.arange(len(idx))[:, None]
    which = jnp.asarray(np.append(code_blocks(slots, store.block), n_blocks))[idx]  # n_blocks = none
    safe = jnp.minimum(which, n_blocks - 1)
    row = jnp.where((which < n_blocks)[..., None], jnp.asarray(block_rows(slots, store.block))[safe], n_rows)
    at, there = jnp.minimum(row, n_rows - 1), row < n_rows  # [B K P]
    codes = store.codes[batch[..., None], at]
    if store.bits == 4:
        codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    scale, zero = (y[batch, safe][:, :, None].astype(jnp.float32) for y in (store.scale, store.zero))
    x = (codes.astype(jnp.float32) * scale + zero).astype(ring.rows.dtype)
    match = ring.slot[:, :, None, :] == row[..., None]  # [B K P W]
    exact = jnp.take_along_axis(ring.rows, jnp.argmax(match, -1)[..., None], axis=2)
    x = jnp.where((match.any(-1) & there)[..., None], exact, x)
    alive = (mass[batch[..., None], at] > 0) & there
    codes, scale, zero = encode(x, store.bits, axis=2, alive=alive[..., None])
    return dataclasses.replace(
        store,
        codes=store.codes.at[batch[..., None], row].set(codes, mode="drop"),
        scale=store.scale.at[batch, which].set(scale[:, :, 0], mode="drop"),
        zero=store.zero.at[batch, which].set(zero[:, :, 0], mode="drop"),
    )
