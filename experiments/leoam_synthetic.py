"""Makes contexts on a disk whose steps choose chunks as on real models: many of them again in the next step.

Rows are random; chunks are known by their boxes alone, which are drawn apart from them. A box of half-width s
around a random centre is bounded by q·c + s·Σ|q_d|: the first part ranks chunks anew for every query, the
second ranks wide boxes high for all of them. Means instead of boxes have lengths exp(τ·normal): the long ones
rank high for half of all queries. τ is set so that a step chooses as large a part of what the step before
chose as on real models, or _WIDEST: with one query of a KV head means give a half at most, and 43% there.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import a2ats_synthetic
from kvjax import chunk_tree, context_folder, disk, states
from kvjax.cache import KV
from kvjax.chunk_tree import Shape, Tree
from kvjax.disk import Disk
from kvjax.method import CacheMethod
from kvjax.methods import layers, per_layer
from kvjax.methods.leoam import LeoAM
from kvjax.model import Model
from kvjax.states import State

__all__ = ["filled", "spread", "written"]

_HALVINGS, _WIDEST, _STEPS = 14, 8.0, 48
_DRAWN = 2**22  # numbers that rows are taken from
_PART = 1024  # slots that are written at once


@functools.cache
def spread(
    n_leaves: int, n: int, group: int, known_by: str, overlap: float, seed: int
) -> tuple[float, float]:
    """Returns the τ by which widths (in deviations of q·c), or lengths, vary so that steps choose alike.

    And the share of a step's choice that the step before chose then, which may be less than was asked for.

    Args:
        n_leaves: of a head, of which each step chooses n.
        known_by: what abstracts are, see `LeoAM`.
        overlap: share of them that the step before chose too.
    """
    low, high = 0.0, _WIDEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = _overlap(n_leaves, n, group, known_by, middle, seed)
        low, high = (low, middle) if found > overlap else (middle, high)
    return high, _overlap(n_leaves, n, group, known_by, high, seed)


def _overlap(n_leaves: int, n: int, group: int, known_by: str, tau: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    wide, before, shares = tau * rng.normal(size=n_leaves), None, []
    for _ in range(_STEPS):
        score = rng.normal(size=(group, n_leaves))
        score = (score + wide if known_by == "box" else score * np.exp(wide)).max(0)
        chosen = np.zeros(n_leaves, bool)
        chosen[np.argpartition(score, -n)[-n:]] = True
        if before is not None:
            shares.append((chosen & before).sum() / n)
        before = chosen
    return float(np.mean(shares))


def written(model: Model, method: CacheMethod, batch: int, tokens: int, seen: int, seed: int) -> None:
    """Writes the chunks of `seen` random tokens for every layer, each to files of its own."""
    state = states.init_state(model, method, batch, tokens)
    own = Disk.of(state)
    store, rng = own.stores[0], np.random.default_rng(seed)
    drawn = rng.standard_normal(_DRAWN, np.float32).astype(store.layout.dtype)
    shape = (batch, store.layout.n_heads, _PART, 2, store.layout.head_dim)
    for first in range(0, seen, _PART):
        n = min(_PART, seen - first)
        rows = np.resize(np.roll(drawn, rng.integers(_DRAWN)), shape)
        store.append(store.end.copy(), rows, store.end + n)
    store.sync()
    for i, other in own.stores.items():
        for file, to in zip(store.files.both, other.files.both, strict=True):
            if i:
                shutil.copyfile(file.path, to.path)
    own.close()


def filled(
    model: Model, method: CacheMethod, batch: int, tokens: int, seen: int, tau: float, seed: int
) -> State:
    """Returns a state of the chunks that `written` left in the method's folder, its pool filled."""
    folder = Path(method.folder)
    own, state = disk.opened(folder), []
    own.generation = int(context_folder.generations(folder)[-1].name)
    kinds = zip(per_layer(method, model.config), layers(model.config), strict=True)
    for i, (one, layer) in enumerate(kinds):
        kv = _occupied(one.init(layer, batch, one.slots(layer, tokens), model.dtype), seen)
        if not disk.on_disk(kv):
            far = a2ats_synthetic.rows(kv.tier.far, jax.random.key(seed + i))
            state.append(kv.replace(tier=kv.tier.replace(far=jax.block_until_ready(far))))
            continue
        kv = disk.reopened(own, i, kv)
        store = own.stores[i]
        store.end[:] = seen
        _warm(store)
        if isinstance(one, LeoAM):
            tree = _tree(jax.random.key(seed + i), kv, one.shape, seen, tau)
            kv = kv.replace(aux=one.placed(tree, kv.fill, kv.slots))
        state.append(kv)
    return tuple(state)


def _occupied(kv: KV, seen: int) -> KV:
    slot = jnp.concatenate([jnp.arange(size, dtype=jnp.int32) for size in kv.slots])
    fill = jnp.full_like(kv.fill, seen)
    return kv.replace(
        pos=jnp.broadcast_to(jnp.where(slot < seen, slot, 0), kv.pos.shape),
        mass=jnp.broadcast_to((slot < seen).astype(jnp.float32), kv.mass.shape),
        fill=fill,
        seen=jnp.full_like(kv.seen, seen),
        tier=kv.tier.replace(first=jnp.array(fill)),
    )


def _warm(store: Any) -> None:
    """Fills the pool: with the first chunks of every head."""
    at = store.layout
    n = min(len(store.pool) // (at.batch * at.n_heads), int(store.end.min()) // at.chunk)
    for chunk in range(n):
        row, head = (x.reshape(-1) for x in np.indices((at.batch, at.n_heads)))
        store.read(row, head, np.full(row.shape, chunk), at.chunk)
    store.check()


def _tree(key: Array, kv: KV, shape: Shape, seen: int, tau: float) -> Tree:
    """Returns abstracts of random centres."""
    n = shape.n_parts(kv.slots)
    first, second = jax.random.split(key)
    centre = jax.random.normal(first, (len(kv.seen), sum(n), kv.layer.head_dim))
    wide = jax.random.normal(second, (*centre.shape[:2], 1))
    per = (2 / jnp.pi * kv.layer.head_dim) ** 0.5  # Σ|q_d| of a query of length 1
    half = jnp.maximum(4 + tau * wide, 0) / per
    if shape.known_by != "box":
        half, centre = jnp.zeros_like(half), centre * jnp.exp(tau * wide)
    keys = jnp.stack([centre - half, centre + half], axis=2).reshape(len(centre), -1, kv.layer.head_dim)
    root = None if shape.root is None else 2 * shape.pairs * shape.children
    two = Shape(2 * shape.pairs, root, shape.pairs, shape.known_by)
    used = [jnp.arange(2 * size) < 2 * (seen // shape.box) for size in n]
    mass = jnp.broadcast_to(jnp.concatenate(used).astype(jnp.float32), keys.shape[:2])
    build = jax.jit(chunk_tree.build, static_argnums=(2, 3))
    return build(keys.astype(kv.tier.k.dtype), mass, tuple(2 * size for size in n), two)
