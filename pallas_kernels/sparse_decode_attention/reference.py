"""Sparse decode attention from its equation, in float32 einsums: the specification of the kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import AttentionForm, Codes, code_blocks, decode_codes, starts
from pallas_kernels.host import take_rows

__all__ = ["run"]


def run(q, k, v, mass, idx, *, form: AttentionForm, block: int):
    """Returns the output [B K G D], and with form.lse the log-sum-exp [B K G]."""
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    size = jnp.asarray(form.slots)[:, None, None]
    slot = idx[..., None] * block + jnp.arange(block)  # [B K N P]
    named = (idx[..., None] >= 0) & (slot < size)
    row = starts(form.slots)[:-1, None, None] + jnp.clip(slot, 0, size - 1)
    shape = (*idx.shape[:2], -1)
    k, v = (_rows(store, row, form).reshape(*shape, q.shape[-1]) for store in (k, v))  # [B K NP D]
    mass = jnp.where(named, jnp.take_along_axis(mass, row.reshape(len(q), -1), 1).reshape(row.shape), 0.0)
    mass = mass.reshape(shape)[:, :, None]  # [B K 1 NP]

    logit = jnp.einsum("bkgd,bksd->bkgs", q.astype(jnp.float32), k, **exact) * form.factor(q.shape[-1])
    if form.softcap is not None:
        logit = form.softcap * jnp.tanh(logit / form.softcap)
    logit = jnp.where(mass > 0, logit + jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)
    top = jnp.max(logit, axis=-1)
    p = jnp.where(mass > 0, jnp.exp(logit - jnp.where(jnp.isfinite(top), top, 0.0)[..., None]), 0.0)
    total = p.sum(-1)
    v = jnp.where(mass[:, :, 0, :, None] > 0, v, 0.0)  # 0·NaN is NaN
    out = jnp.einsum("bkgs,bksd->bkgd", p, v, **exact) / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, jnp.log(total) + top, -jnp.inf)
    return (out.astype(q.dtype), lse) if form.lse else out.astype(q.dtype)


def _rows(store, row, form: AttentionForm):
    """Returns the rows of a store at row [B K N P], as float32 [B K N P D]."""
    if isinstance(store, Codes):
        at = row if store.block is None else jnp.asarray(code_blocks(form.slots, store.block))[row]
        scale, zero = take_rows(store.scale, at), take_rows(store.zero, at)
        store = Codes(
            take_rows(store.codes, row), scale, zero, store.bits, None
        )  # a scale of its own per row
        return decode_codes(store, form.slots)
    return take_rows(store, row).astype(jnp.float32)
