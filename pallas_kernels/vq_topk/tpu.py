"""Slots chosen by their codes on a TPU, by the kernels of `vq_scores` and `union_topk`.

Those choose one number for all rows: what a row marks, and what it chooses less than that number, ranks
above all scores, the latter in places behind the slots.
"""

import jax.numpy as jnp

from pallas_kernels.union_topk import tpu as union_topk
from pallas_kernels.vq_scores import ALWAYS
from pallas_kernels.vq_scores import tpu as vq_scores

__all__ = ["run"]


def run(q, codebook, codes, counts, n, *, k: int, n_always: int):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types and sizes that the kernels do not take.
    """
    size, group, most = codes.shape[2], q.shape[2], k + n_always
    limit = min(group * k + n_always, size)
    scores = vq_scores.run(q, codebook, jnp.maximum(codes, ALWAYS), reduce=None, dtype=jnp.float32)
    n_rest = most - n[:, None] - jnp.sum(codes <= ALWAYS, axis=2)  # [B K]
    rest = jnp.where(jnp.arange(most) < n_rest[..., None], jnp.inf, -jnp.inf)
    rest = jnp.broadcast_to(rest[:, :, None], (*scores.shape[:3], most)).astype(scores.dtype)
    idx = union_topk.run(jnp.concatenate([scores, rest], axis=3), k=most, limit=limit + most)[..., :limit]
    return jnp.where(idx < size, idx, -1)
