"""Makes states whose steps choose tokens as real models do: many of them again in the next step.

Keys are known to A²ATS by their codes alone. Random codewords of equal length would rank the tokens anew
for every query; with lengths exp(σ·normal) the long ones rank high for half of all queries, whatever they
ask. σ is set so that a cache of `lines` tokens, the least recently read leaving first, finds as many there
as it was measured to on real models; long contexts are simulated at 8,192 tokens, since shares decide. Many
lines hold what hundreds of steps have read, so as many steps are simulated as are timed.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kvjax import states
from kvjax.cache import KV
from kvjax.calibrate.codebooks import Codebooks
from kvjax.method import CacheMethod
from kvjax.methods import per_layer
from kvjax.model import Model
from kvjax.models.config import ModelConfig
from kvjax.states import State
from pallas_kernels import Codes

__all__ = ["Locality", "books", "filled", "locality", "rows"]

_CENTROIDS, _HALVINGS, _WIDEST = 4096, 12, 4.0
_STEPS, _FIRST = 320, 128  # steps, and those of them that fill lines, as they are timed
_SIMULATED = 8192  # tokens, at most
_PARTS = 256  # of an array of rows, at most


@dataclass(frozen=True)
class Locality:
    """What steps choose, found by simulation: σ, the share that lines hold, and tokens of the union."""

    sigma: float
    hit_rate: float
    union: float


@functools.cache
def locality(tokens: int, topk: int, group: int, lines: int, hit_rate: float, seed: int) -> Locality:
    """Finds the σ that gives a hit rate, or comes closest to it.

    Args:
        tokens: of a head, of which each of `group` query heads chooses topk.
        lines: tokens that the device holds.
    """
    scale = min(1.0, _SIMULATED / tokens)
    sizes = [max(1, round(scale * n)) for n in (tokens, topk, lines)]
    rates = functools.partial(_rates, *sizes, group=group, seed=seed)
    low, high = 0.0, _WIDEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rates(sigma=middle)[0] > hit_rate else (middle, high)
    found, union = rates(sigma=high)
    return Locality(high, found, union / scale)


def _rates(tokens: int, topk: int, lines: int, *, group: int, sigma: float, seed: int) -> tuple[float, float]:
    """Returns the hit rate of one head's cache over the later steps, and the mean union."""
    rng = np.random.default_rng(seed)
    words = _codewords(rng, _CENTROIDS, 64, sigma)
    codes = rng.integers(0, _CENTROIDS, tokens)
    table = rng.normal(size=(_STEPS * group, 64)).astype(np.float32) @ words.T.astype(np.float32)
    used, first = np.full(tokens, -1), max(0, tokens - lines)
    hits, unions = [], []
    for step, scores in enumerate(table.reshape(_STEPS, group, -1)):
        chosen = np.zeros(tokens, bool)
        chosen[np.argpartition(scores[:, codes], -topk, axis=1)[:, -topk:]] = True
        since = max(np.partition(used, first)[first], 0)  # of the `lines` read last
        hits.append((used[chosen] >= since).mean())
        unions.append(chosen.sum())
        used[chosen] = step
    return float(np.mean(hits[_FIRST:])), float(np.mean(unions))


def _codewords(rng: np.random.Generator, n: int, size: int, sigma: float) -> np.ndarray:
    words = rng.normal(size=(n, size))
    return words / np.linalg.norm(words, axis=1, keepdims=True) * np.exp(sigma * rng.normal(size=(n, 1)))


def books(config: ModelConfig, far: int, window: int, sigma: float, seed: int) -> Codebooks:
    """Returns codebooks of codewords whose lengths vary by σ, in the plain frame; no layer is flat."""
    c, rng = config, np.random.default_rng(seed)
    words = _codewords(rng, _CENTROIDS, c.head_dim, sigma).astype(np.float32)
    shape = (c.n_layers, c.n_kv_heads)
    metric = np.broadcast_to(np.eye(c.head_dim, dtype=np.float32), (*shape, c.head_dim, c.head_dim))
    centroids = np.broadcast_to(words, (*shape, *words.shape))
    return Codebooks(centroids, metric, (False,) * c.n_layers, "random", far, window)


def filled(model: Model, method: CacheMethod, batch: int, seen: int, total: int, seed: int) -> State:
    """Returns a state for `total` tokens as if `seen` random ones had been read, their codes random too."""
    left = list(states.init_state(model, method, batch, total))[::-1]
    keys = jax.random.split(jax.random.key(seed), len(left))
    methods = per_layer(method, model.config)
    return tuple(_layer(left.pop(), key, one, seen) for key, one in zip(keys, methods, strict=True))


def _layer(kv: KV, key: Array, method: CacheMethod, seen: int) -> KV:
    """Fills a layer: its rows one array at a time, so that the device holds one of them."""
    keys = jax.random.split(key, 3)
    if kv.tier is None:
        kv = kv.replace(k=rows(kv.k, keys[0]))
        kv = jax.block_until_ready(kv.replace(v=rows(kv.v, keys[1])))
    else:
        far = jax.block_until_ready(rows(kv.tier.far, keys[0]))
        kv = kv.replace(tier=kv.tier.replace(far=far))
    return _index(kv, keys[2], method, seen)


def rows(store: object, key: Array) -> object:
    """Returns random rows of the store's shape and type, where it lies: normal ones, or codes of -2 to 2."""
    if not isinstance(store, Codes):
        return jax.device_put(_drawn(key, store.shape, store.dtype), store.sharding)
    codes = jax.device_put(_drawn(key, store.codes.shape, store.codes.dtype), store.codes.sharding)
    scale, zero = jnp.full_like(store.scale, 4 / 255), jnp.full_like(store.zero, -2)
    return Codes(codes, scale, zero, store.bits, store.block)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: Array, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Draws an array part by part: a generator takes 16 bytes and more for each number that it makes."""
    draw = jax.random.bits if jnp.issubdtype(dtype, jnp.unsignedinteger) else jax.random.normal
    n_parts = math.gcd(math.prod(shape[:2]), _PARTS)
    part = (math.prod(shape[:2]) // n_parts, *shape[2:])
    return jax.lax.map(lambda key: draw(key, part, dtype), jax.random.split(key, n_parts)).reshape(shape)


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def _index(kv: KV, key: Array, method: CacheMethod, seen: int) -> KV:
    slot = jnp.concatenate([jnp.arange(size, dtype=jnp.int32) for size in kv.slots])
    codes = jax.random.randint(key, kv.pos.shape, 0, kv.aux.centroids.shape[2], jnp.int32)
    fill = jnp.full_like(kv.fill, seen)
    kv = kv.replace(
        pos=jnp.broadcast_to(jnp.where(slot < seen, slot, 0), kv.pos.shape),
        mass=jnp.broadcast_to((slot < seen).astype(jnp.float32), kv.mass.shape),
        fill=fill,
        seen=jnp.full_like(kv.seen, seen),
        aux=kv.aux.replace(codes=jnp.where(slot < seen, codes, -1).astype(jnp.int16)),
        tier=None if kv.tier is None else kv.tier.replace(first=fill),
    )
    return method.moved(kv, jnp.broadcast_to(jnp.arange(kv.pos.shape[1]), kv.pos.shape))
