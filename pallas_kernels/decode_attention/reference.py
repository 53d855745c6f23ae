"""Decode attention from its equation, in float32 einsums: the specification of the kernels."""

import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import AttentionForm, decode_codes, read_length, starts

__all__ = ["run"]


def run(q, k, v, mass, length, pos, *, form: AttentionForm):
    """Returns the output [B K G D], and with form.lse the log-sum-exp [B K G]."""
    k, v = decode_codes(k, form.slots), decode_codes(v, form.slots)
    length = read_length(mass, length, pos, form)
    first, head, out, lse = starts(form.slots), 0, [], []
    for size, alike in itertools.groupby(form.slots):  # neighbouring heads of one size share a view
        n = len(list(alike))
        rows = slice(first[head], first[head + n])
        heads = slice(head, head + n)
        parts = (x[:, rows].reshape(x.shape[0], n, size, *x.shape[2:]) for x in (k, v, mass))
        part = _heads(q[:, heads], *parts, length[:, heads], form)
        out.append(part[0])
        lse.append(part[1])
        head += n
    out = jnp.concatenate(out, axis=1).astype(q.dtype)
    return (out, jnp.concatenate(lse, axis=1)) if form.lse else out


def _heads(q, k, v, mass, length, form: AttentionForm):
    """Attends with heads of equal capacity: k, v [B K S D], mass [B K S]."""
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logit = jnp.einsum("bkgd,bksd->bkgs", q, k, **exact) * form.factor(q.shape[-1])
    if form.softcap is not None:
        logit = form.softcap * jnp.tanh(logit / form.softcap)
    alive = (mass > 0) & (jnp.arange(mass.shape[-1]) < length[..., None])
    logit = logit + jnp.log(jnp.where(alive, mass, 1.0))[:, :, None]
    logit = jnp.where(alive[:, :, None], logit, -jnp.inf)
    top = jnp.max(logit, axis=-1, keepdims=True)
    p = jnp.where(alive[:, :, None], jnp.exp(logit - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = p.sum(-1)
    v = jnp.where(alive[..., None], v, 0.0)  # 0·NaN is NaN
    out = jnp.einsum("bkgs,bksd->bkgd", p, v, **exact)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return out, jnp.where(total > 0, jnp.log(total) + top[..., 0], -jnp.inf)
