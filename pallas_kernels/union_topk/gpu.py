"""The union of a group's top-k in Pallas Triton, of the kernels of `select_topk`.

Each query head's threshold is found as there, its indices are not written: a second read of the
scores, from the L2 cache where they fit, keeps what is within any head's threshold, and a last
program per KV head chooses from that.
"""

from pallas_kernels.select_topk.gpu import bound, choose, keep

__all__ = ["run"]


def run(scores, *, k: int, limit: int):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take.
    """
    batch, n_heads, group, size = scores.shape
    key, last = (x.reshape(-1, group) for x in bound(scores.reshape(-1, size), k))
    kept = keep(scores.reshape(-1, group, size), key, last, k)
    return choose(None, None, kept, limit).reshape(batch, n_heads, limit)
