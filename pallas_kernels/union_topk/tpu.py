"""The union of a group's top-k in Pallas Mosaic, by the kernel of `select_topk`.

A program holds a group's query heads in VMEM, bisects all their thresholds at once, unites what is
within them there, and compacts once.
"""

from pallas_kernels.select_topk.tpu import select

__all__ = ["run"]


def run(scores, *, k: int, limit: int):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take, and groups beyond VMEM.
    """
    batch, n_heads, group, size = scores.shape
    return select(scores.reshape(-1, group, size), k, limit).reshape(batch, n_heads, limit)
