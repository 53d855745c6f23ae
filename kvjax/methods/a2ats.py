"""A²ATS: keeps everything and reads, at each step, the tokens that seem to matter to the query.

A key is known by the code of its nearest codeword, which is of the key before its rotation; so a token's
score needs one look-up in a table of the query's products with all codewords. Queries are rotated by a
fixed distance b, as if all tokens were that far: positions matter to the ranking of near tokens only, and
those are read anyway.

    code_t = argmin_j ‖k_t A − c_j A‖      before its rotation; in float32
    u_h[t] = (q_h R_b)·c[code_t]           both as q and k are given, of the model's type
    read   the `topk` tokens of largest u of every query head, the newest `window`, the first `n_sinks`
    attend exactly, over the union of a KV head's query heads

State: an int16 code per slot, 1/(2·D) of the bytes of K and V, how many slots have each code, and the
layer's codewords, in the frame that finds codes and in that of queries. Holds the whole cache: on the device
it saves reads, not memory; on the host, both.

Source: arXiv 2502.12665, and its released code: w 64, b 2,048, 8 sinks. Deviations: layers whose attention
is flat are read in full. Codebooks: `kvjax.calibrate`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax import cache, storage, tiers
from kvjax.attend import Selection
from kvjax.cache import KV, Layer
from kvjax.calibrate.codebooks import Codebooks
from kvjax.method import CacheMethod
from kvjax.rope import rotate, rotate_rows
from kvjax.shapes import Leaf, Positions, Queries, Slots, Tokens
from pallas_kernels import vq_assign, vq_topk
from pallas_kernels.vq_topk import histogram, marked

__all__ = ["A2ATS", "Index"]


@struct.dataclass
class Index:
    """Codes of the slots, and the codebooks of a layer, with an axis of one row before the heads.

    Slots that are always read have marked codes and are not counted; they are when they leave the window.
    """

    codes: Leaf  # [B R] int16, -1 = none
    counts: Leaf  # [B K C] int32, slots of each code
    recent: Leaf  # [B K W] int32, packed row of the window's token of position p, at p % W; -1 = none
    centroids: Leaf  # [1 K C D] float32, in the frame k A
    metric: Leaf  # [1 K D D] float32, A
    words: Leaf  # [1 K C D] the same in the frame of k, of its type


@dataclass(frozen=True)
class A2ATS(CacheMethod):
    """Reads `topk` tokens per query head and step. aux: `Index`, none in layers that are read in full.

    Args:
        topk: tokens, or a share of those seen; None reads all, which is what flat layers do.
        calibration: the model's codebooks; those of one layer in `for_layer`.
        window: newest tokens that are always read.
        n_sinks: first tokens that are always read.
        far: the distance b, in tokens, at which tokens are ranked.
        tier: where K and V of layers that are not flat lie, "device" or "host".
        hot: on the host, tokens of each KV head whose rows stay on the device from step to step: at least
            what a step may read, 0 for none, None for twice what it may.
        host_block: on the host, tokens that are brought together; a TPU brings 8 KiB of K and V, or more.
        host_bits: on the host, 8 for codes with a scale per row (not on a TPU), None for rows as they are.
    """

    topk: int | float | None
    calibration: Codebooks = field(compare=False)  # what a state needs of it is in its index
    window: int = 64
    n_sinks: int = 8
    far: int = 2048
    tier: str = "device"
    hot: int | None = None
    host_block: int = 1
    host_bits: int | None = None
    evicts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises ValueError for settings out of range, or codebooks for another distance."""
        super().__post_init__()
        share = isinstance(self.topk, float)
        if self.topk is not None and not (0 < self.topk <= 1 if share else self.topk >= 1):
            raise ValueError(f"topk is tokens, 1 or more, or a share, above 0 to 1.0, got {self.topk=}")
        if self.window < 1 or self.n_sinks < 0:
            raise ValueError(
                f"window is at least 1 and n_sinks at least 0, got {self.window=}, {self.n_sinks=}"
            )
        if self.tier not in ("device", "host") or self.host_bits not in (None, 8) or self.host_block < 1:
            raise ValueError(
                'K and V lie on the "device" or the "host", there as they are or in 8 bits, in blocks of 1 '
                f"or more tokens, got {self.tier=}, {self.host_bits=}, {self.host_block=}"
            )
        if self.calibration.far != self.far:
            raise ValueError(
                f"codebooks are made for one distance, got far={self.calibration.far} for {self.far=}: "
                "calibrate anew"
            )

    @property
    def learnt(self) -> Codebooks:
        """The codebooks."""
        return self.calibration

    def for_layer(self, index: int, n_layers: int) -> "A2ATS":
        """Returns the method of one layer; flat ones read everything.

        Raises:
            ValueError: for codebooks of another number of layers.
        """
        flat = self.calibration.flat
        if len(flat) != n_layers:
            raise ValueError(f"each layer has codebooks, got those of {len(flat)} for {n_layers=}")
        own = replace(self, calibration=self.calibration.layer(index))
        return replace(own, topk=None) if flat[index] else own

    def init(self, layer: Layer, batch: int, slots, dtype) -> KV:
        """Returns an empty state with the layer's codebooks.

        Raises:
            ValueError: for codebooks of another shape, more tokens to read than a head holds, or fewer
                hot ones than a step may read.
        """
        host = self._host(layer, slots) if self.tier == "host" and self.topk is not None else None
        kv = cache.allocate(layer, batch, slots, dtype, rotated=self.rotated, host=host)
        if self.topk is None:
            return kv
        if isinstance(self.topk, int) and self.topk > max(slots):
            raise ValueError(f"topk is at most the slots of a head, {max(slots)}, got {self.topk=}: lower it")
        (centroids,), (metric,) = self.calibration.centroids, self.calibration.metric
        wanted = (layer.n_kv_heads, layer.head_dim)
        if (centroids.shape[0], centroids.shape[2]) != wanted:
            raise ValueError(
                f"codebooks are [K C D] with the model's K and D, {wanted}, got {centroids.shape}: "
                "calibrate this model"
            )
        centroids, metric = (jnp.asarray(x, jnp.float32) for x in (centroids, metric))
        exact = jax.lax.Precision.HIGHEST
        words = jnp.einsum("kcd,kde->kce", centroids, jnp.linalg.inv(metric), precision=exact).astype(dtype)
        codes, recent = jnp.full(kv.pos.shape, -1, jnp.int16), jnp.full(kv.fill.shape, -1, jnp.int32)
        recent = jnp.repeat(recent[..., None], self.window, axis=2)
        counts = jnp.zeros((*kv.fill.shape, centroids.shape[1]), jnp.int32)
        return kv.replace(aux=Index(codes, counts, recent, centroids[None], metric[None], words[None]))

    def observe(self, kv: KV, q: Queries, k: Tokens, pos: Positions, idx: Slots) -> KV:
        """Finds the codes of the new tokens; counts them, and those that leave the window."""
        if self.topk is None:
            return kv
        index, n_rows = kv.aux, kv.pos.shape[1]
        since, n_codes = (kv.seen - self.window)[:, None, None], index.counts.shape[2]
        b, head = jnp.arange(idx.shape[0])[:, None, None], jnp.arange(idx.shape[1])[:, None]
        row, code, at = index.recent, _codes(index, jnp.swapaxes(k, 1, 2)), pos[:, None]
        when, plain = kv.pos[b, row], marked(index.codes[b, row])
        gone = (row >= 0) & (when < since)
        left = gone & (when >= self.n_sinks)
        always, here = (at < self.n_sinks) | (at >= since), idx < n_rows
        both = functools.partial(jnp.concatenate, axis=2)  # what leaves the window, and what is new
        places = both([jnp.where(left, row, n_rows), idx])
        codes = index.codes.at[b, places].set(
            both([plain, jnp.where(always, marked(code), code)]), mode="drop"
        )
        ranked = both([jnp.where(left, plain, n_codes), jnp.where(here & ~always, code, n_codes)])
        counts = index.counts.at[b, head, ranked].add(1, mode="drop")
        place = jnp.where(here & (at >= since), at % self.window, self.window)
        recent = jnp.where(gone, -1, row).at[b, head, place].set(idx, mode="drop")
        return kv.replace(aux=index.replace(codes=codes, counts=counts, recent=recent))

    def moved(self, kv: KV, idx) -> KV:
        """Carries the codes along, or finds all of them anew."""
        if self.topk is None:
            return kv
        if idx is not None:
            codes = cache.take(kv.aux.codes, idx, -1)
            codes = jnp.where(codes < -1, marked(codes), codes)
        else:
            keys = rotate_rows(storage.read(kv.k), kv.pos, kv.layer.rope, back=True)
            found = [_codes(_of(kv.aux, run), cache.view(keys, run)) for run in cache.runs(kv.slots)]
            codes = jnp.concatenate([x.reshape(x.shape[0], -1) for x in found], axis=1)
        parts = [self._indexed(kv, cache.view(codes, run), run) for run in cache.runs(kv.slots)]
        codes, counts, recent = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        return kv.replace(aux=kv.aux.replace(codes=codes, counts=counts, recent=recent))

    def _indexed(self, kv: KV, codes: Int[Array, "B n S"], run: cache.Run) -> tuple[Array, ...]:
        """Returns the codes of a run, packed and marked, their counts, and the rows of its window."""
        alive, when = cache.view(kv.mass, run) > 0, cache.view(kv.pos, run)
        rows = run.row + jnp.arange(run.n * run.size, dtype=jnp.int32).reshape(run.n, run.size)
        b, head, place = jnp.arange(len(codes))[:, None, None], jnp.arange(run.n)[:, None], when % self.window
        inside = alive & (when >= (kv.seen - self.window)[:, None, None])
        recent = jnp.full((len(codes), run.n, self.window), -1, jnp.int32)
        rows = jnp.broadcast_to(rows, codes.shape)
        recent = recent.at[b, head, jnp.where(inside, place, self.window)].max(rows, mode="drop")
        always = (when < self.n_sinks) | (recent[b, head, place] == rows)
        codes = jnp.where(alive, jnp.where(always, marked(codes), codes), -1).astype(jnp.int16)
        return codes.reshape(len(codes), -1), histogram(codes, kv.aux.counts.shape[2]), recent

    def select(self, kv: KV, q: Queries, pos: Positions) -> Selection | None:
        """Returns the tokens that this query reads; prompts (T > 1) read all."""
        if self.topk is None or q.shape[1] > 1:
            return None
        far = rotate(q, jnp.full(q.shape[:4], self.far), kv.layer.rope)[:, 0]
        chosen = [self._chosen(kv, far, run) for run in cache.runs(kv.slots)]
        most = max(x.shape[-1] for x in chosen)
        room = [((0, 0), (0, 0), (0, most - x.shape[-1])) for x in chosen]
        padded = [jnp.pad(x, r, constant_values=-1) for x, r in zip(chosen, room, strict=True)]
        return Selection(idx=jnp.concatenate(padded, axis=1), block=1)

    def _host(self, layer: Layer, slots: Sequence[int]) -> tiers.Host:
        """Returns how a layer lies on the host."""
        n_blocks = -(-max(slots) // self.host_block)
        needed = min(max(self._limit(size, layer.group) for size in slots), n_blocks)
        hot = 2 * needed if self.hot is None else self.hot // self.host_block
        if self.hot and hot < needed:
            raise ValueError(
                f"hot tokens are 0, or at least what a step may read, {needed * self.host_block}, "
                f"got {self.hot=}"
            )
        lines = min(max(hot, needed), n_blocks)
        return tiers.Host(lines, self.host_block, self.host_bits, keep=hot > 0)

    def _limit(self, size: int, group: int) -> int:
        """Returns how many tokens a step reads at most, of a head of `size` slots."""
        return min(group * min(self._count(size), size) + self.n_sinks + self.window, size)

    def _chosen(self, kv: KV, far: Float[Array, "B K G D"], run: cache.Run) -> Int[Array, "B n N"]:
        """Returns the slots that the heads of a run read, at most G·topk and what is always read."""
        heads, most = slice(run.head, run.head + run.n), min(self._count(run.size), run.size)
        return vq_topk(
            far[:, heads], kv.aux.words[0, heads], cache.view(kv.aux.codes, run),
            kv.aux.counts[:, heads], jnp.minimum(self._count(kv.seen), most),
            k=most, n_always=min(self.n_sinks + self.window, run.size),
        )  # fmt: skip

    def _count(self, seen):
        """Returns how many tokens each query head chooses of `seen`, at least one."""
        if isinstance(self.topk, int):
            return self.topk if isinstance(seen, int) else jnp.full_like(seen, self.topk)
        share = self.topk * seen
        return max(1, int(share)) if isinstance(seen, int) else jnp.maximum(1, share.astype(jnp.int32))


def _of(index: Index, run: cache.Run) -> Index:
    """Returns the codebooks of the heads of a run."""
    heads = slice(run.head, run.head + run.n)
    return index.replace(centroids=index.centroids[:, heads], metric=index.metric[:, heads])


def _codes(index: Index, k: Float[Array, "B K T D"]) -> Array:
    """Returns the code of every key, which is not rotated."""
    own = jnp.einsum(
        "bktd,xkde->bkte", k.astype(jnp.float32), index.metric, precision=jax.lax.Precision.HIGHEST
    )
    return vq_assign(own, index.centroids[0])
