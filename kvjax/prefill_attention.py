"""Attends with the queries of a prompt, by a library's kernel where the device has one.

The kernels of the libraries know no slots, so what a slot is goes in as they allow: cuDNN takes a
bias [T S] of log masses and of the mask, splash attention a mask and, as it has no bias, log
masses as two more channels of the keys. Both read every slot; XLA's blocks stop at the last
occupied one and hold nothing of the size of the mask, and run for what the libraries refuse.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1, for the blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import Layer
from kvjax.shapes import Positions, Queries
from pallas_kernels import backend, dispatch

__all__ = ["attend_prompt", "logits", "precision"]

_BLOCK = 256  # slots per step of XLA's attention
_NEVER = float(jnp.finfo(jnp.float32).min)  # logit of a slot that is not visible


def attend_prompt(
    q: Queries,
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    when: Int[Array, "B K S"],
    mass: Float[Array, "B K S"],
    pos: Positions,
    *,
    layer: Layer,
    impl: str | None = None,
) -> Queries:
    """Returns attention of T rotated queries over slots with rotated keys; a row with no slot gives 0.

    Args:
        when: positions of the slots; a query at pos sees those with when <= pos.
        mass: tokens that each slot stands for; an empty slot (0) may hold anything.
        layer: scale, soft cap and window.
        impl: None, "reference" (XLA), "gpu" (cuDNN) or "tpu" (splash), see `dispatch`.

    Raises:
        NotImplementedError: where impl names a library that does not take this.

    cuDNN's bias rounds log masses to q's type, which moves weights by 2⁻⁹·log mass; 0 and 1 are exact.

    Cost: 4·B·T·G·ΣS·D FLOPs. A library reads and writes K and V once more, to empty what is no
    slot, and writes a mask: 2·B·K·T·S bytes for cuDNN, B·K·T·S for splash.
    """
    impls = {"reference": _blocks, "gpu": _cudnn, "tpu": _splash}
    return dispatch.run("prefill_attention", impl, impls, q, k, v, when, mass, pos, layer=layer)


def logits(layer: Layer, q: Array, pos: Array, k: Array, when: Array, mass: Array) -> Array:
    """Returns masked logits [B K X S] in float32 of rotated queries [B K X D] at their positions [B X]."""
    exact = {"precision": precision(q.dtype), "preferred_element_type": jnp.float32}
    logit = jnp.einsum("bkxd,bksd->bkxs", q, k, **exact) * layer.scale
    if layer.softcap is not None:
        logit = layer.softcap * jnp.tanh(logit / layer.softcap)
    return jnp.where(_visible(when, mass, pos, layer), logit + _log(mass)[:, :, None], _NEVER)


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Keeps float32 products in float32 where hardware would round their factors."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _visible(when: Array, mass: Array, pos: Array, layer: Layer) -> Array:
    """Returns which slots each query sees, [B K T S]."""
    when, mass, pos = when[:, :, None, :], mass[:, :, None, :], pos[:, None, :, None]
    seen = (mass > 0) & (when <= pos)
    return seen if layer.window is None else seen & (when > pos - layer.window)


def _emptied(x: Array, mass: Array) -> Array:
    """Returns rows with 0 where there is no slot: they may hold NaN, and 0·NaN is NaN."""
    return jnp.where((mass > 0)[..., None], x, 0)


def _log(mass: Array) -> Array:
    return jnp.log(jnp.where(mass > 0, mass, 1.0))


def _cudnn(q, k, v, when, mass, pos, *, layer: Layer):
    """Attends by cuDNN: KV heads as rows of the batch, so that their query heads share a bias."""
    batch, length, n_heads, group, size = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or size % 8 or size > 128:
        raise NotImplementedError(
            f"cuDNN takes bfloat16 and float16 and head sizes up to 128 by 8, got {q.dtype} and D={size}"
        )
    if layer.softcap is not None:
        raise NotImplementedError(f"cuDNN has no soft cap, got {layer.softcap=}")
    # What is visible, all T·S of it, waits for the queries: else XLA makes it of all layers before the first.
    q, when, mass, pos = jax.lax.optimization_barrier((q, when, mass, pos))
    seen = _visible(when, mass, pos, layer)
    lowest = float(jnp.finfo(q.dtype).min) / 2  # a sum with a logit stays finite
    bias = jnp.where(seen, _log(mass)[:, :, None], lowest).astype(q.dtype)
    used = jnp.max(jnp.where(mass > 0, jnp.arange(1, mass.shape[2] + 1), 1), axis=-1)
    rows = jnp.moveaxis(q, 1, 2).reshape(batch * n_heads, length, group, size)
    keys, values = (_emptied(x, mass).reshape(batch * n_heads, -1, 1, size) for x in (k, v))
    try:
        out = jax.nn.dot_product_attention(
            rows, keys, values, bias=bias.reshape(batch * n_heads, 1, length, -1), scale=layer.scale,
            key_value_seq_lengths=used.reshape(-1).astype(jnp.int32), implementation="cudnn",
        )  # fmt: skip
    except RuntimeError as error:
        raise NotImplementedError(f"cuDNN must be installed, got {error}") from error
    out = jnp.moveaxis(out.reshape(batch, n_heads, length, group, size), 1, 2)
    return jnp.where(jnp.any(seen, -1).swapaxes(1, 2)[..., None, None], out, 0)


def _splash(q, k, v, when, mass, pos, *, layer: Layer):
    """Attends by splash attention: every KV head is a head of its own, query heads come one by one."""
    batch, length, n_heads, group, size = q.shape
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"splash attention computes in bfloat16, got {q.dtype}")
    if layer.softcap is not None:
        raise NotImplementedError(f"splash attention caps what masses are added to, got {layer.softcap=}")
    if length % 8:
        raise NotImplementedError(f"splash attention takes queries by 8, got T={length}")
    block = min(512, -(-mass.shape[2] // 128) * 128)
    pad = (0, -mass.shape[2] % block)
    mass, when = (jnp.pad(x, ((0, 0), (0, 0), pad)) for x in (mass, when))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), pad, (0, 0))) for x in (k, v))
    seen = _visible(when, mass, pos, layer)
    high = _log(mass).astype(k.dtype)
    low = (_log(mass) - high.astype(jnp.float32)).astype(k.dtype)  # together they are nearly float32
    keys = _channels(_emptied(k, mass), jnp.stack([high, low], -1))
    queries = _channels(q * jnp.asarray(layer.scale, q.dtype), jnp.ones((*q.shape[:-1], 2), q.dtype))
    queries = jnp.transpose(queries, (3, 0, 2, 1, 4)).reshape(group, batch * n_heads, length, -1)
    keys, values = (x.reshape(batch * n_heads, *x.shape[2:]) for x in (keys, _emptied(v, mass)))
    mask = seen.reshape(batch * n_heads, length, -1)
    kernel = backend.splash_kernel(mask, block_q=_divisor(length, 512), block_kv=block)
    out = jax.vmap(kernel, in_axes=(0, None, None))(queries, keys, values)
    out = jnp.transpose(out.reshape(group, batch, n_heads, length, size), (1, 3, 2, 0, 4))
    return jnp.where(jnp.any(seen, -1).swapaxes(1, 2)[..., None, None], out, 0).astype(q.dtype)


def _divisor(n: int, most: int) -> int:
    """Returns the largest divisor of n that is no more than `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _channels(x: Array, more: Array) -> Array:
    """Returns x with more channels, filled up to whole lanes."""
    size = x.shape[-1] + more.shape[-1]
    return jnp.concatenate([x, more, jnp.zeros((*x.shape[:-1], -size % 128), x.dtype)], axis=-1)


def _blocks(q, k, v, when, mass, pos, *, layer: Layer):
    """Attends in XLA; gradients of q, k and v are those of attention to all slots at once."""
    attended = jax.custom_vjp(functools.partial(_attended, layer))
    attended.defvjp(lambda *arrays: (attended(*arrays), arrays), functools.partial(_backward, layer))
    return attended(q, k, v, when, mass, pos)


def _attended(layer: Layer, q, k, v, when, mass, pos):
    """Attends block after block of slots as far as slots are occupied."""
    batch, length, n_heads, group, size = q.shape
    rows = jnp.moveaxis(q, 1, 3).reshape(batch, n_heads, group * length, size)
    pos = jnp.tile(pos, (1, group))  # [B X], X = G·T
    slots, n_slots = (k, v, when, mass), mass.shape[2]
    block = min(_BLOCK, n_slots)
    used = jnp.max(jnp.where(mass > 0, jnp.arange(1, n_slots + 1), 0))
    part = functools.partial(_partial, layer, rows, pos)

    def step(i, carry):
        top, total, out = carry
        start = jnp.minimum(i * block, n_slots - block)  # the last block may overlap the one before
        here = [jax.lax.dynamic_slice_in_dim(x, start, block, axis=2) for x in slots]
        here[3] = jnp.where(start + jnp.arange(block) >= i * block, here[3], 0.0)
        new_top, new_total, new_out = part(*here)
        joint = jnp.maximum(top, new_top)
        old, new = jnp.exp(top - joint), jnp.exp(new_top - joint)
        return joint, total * old + new_total * new, out * old[..., None] + new_out * new[..., None]

    shape = rows.shape[:3]
    empty = (jnp.full(shape, _NEVER), jnp.zeros(shape), jnp.zeros(rows.shape))
    _, total, out = jax.lax.fori_loop(0, (used + block - 1) // block, step, empty)
    return _shared(total, out, q)


def _shared(total: Array, out: Array, q: Array) -> Array:
    """Divides by the sum of weights, and gives the queries' shape back."""
    batch, length, n_heads, group, size = q.shape
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.moveaxis(out.reshape(batch, n_heads, group, length, size), 3, 1).astype(q.dtype)


def _backward(layer: Layer, arrays: tuple[Array, ...], change: Array) -> tuple:
    """Returns the gradients of q, k and v; masses and positions are not learnt."""
    q, k, v, when, mass, pos = arrays

    def attended(q, k, v):
        rows = jnp.moveaxis(q, 1, 3).reshape(*k.shape[:2], -1, q.shape[-1])
        _, total, out = _partial(layer, rows, jnp.tile(pos, (1, q.shape[3])), k, v, when, mass)
        return _shared(total, out, q)

    return *jax.vjp(attended, q, k, v)[1](change), None, jnp.zeros_like(mass), None


def _partial(
    layer: Layer, q: Array, pos: Array, k: Array, v: Array, when: Array, mass: Array
) -> tuple[Array, Array, Array]:
    """Returns the largest logit [B K X], the sum of weights [B K X] and the weighted values [B K X D]."""
    logit = logits(layer, q, pos, k, when, mass)
    top = jnp.max(logit, axis=-1)
    p = jnp.where(logit > _NEVER, jnp.exp(logit - top[..., None]), 0.0)
    exact = {"precision": precision(v.dtype), "preferred_element_type": jnp.float32}
    out = jnp.einsum("bkxs,bksd->bkxd", p.astype(v.dtype), _emptied(v, mass), **exact)
    return top, p.sum(-1), out
