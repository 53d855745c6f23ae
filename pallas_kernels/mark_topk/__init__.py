"""Which scores are the k largest of each row, where each row has a k of its own."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.mark_topk import gpu, reference

__all__ = ["mark_topk"]


def mark_topk(
    scores: Float[Array, "*rows S"], k: Int[Array, "*rows"], *, impl: str | None = None
) -> Bool[Array, "*rows S"]:
    """Returns whether each score is one of the k largest of its row.

    Of equal scores, and 0.0 and -0.0 are equal, the first are; -inf is never marked.

    Args:
        scores: float32, bfloat16 or float16.
        k: how many of each row; below 1 for none.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs: XLA sorts.

    Raises:
        ValueError: for shapes that disagree; in debug mode for a NaN.
        NotImplementedError: for a type without a kernel, where impl names one.

    Source: the choice of merges in Token Merging (arXiv 2210.09461) and Chelsea (arXiv 2506.11418).

    Cost: reads the scores once and writes S marks; on a GPU some 30 times what a block holds of a row.

    Example:
        >>> mark_topk(jnp.asarray([[3.0, 1.0, 2.0], [-jnp.inf, 0.0, 1.0]]), jnp.asarray([2, 3])).tolist()
        [[True, False, True], [False, True, True]]
    """
    if k.shape != scores.shape[:-1]:
        raise ValueError(f"each row has a k, got {k.shape=} for {scores.shape=}")
    debug_check(lambda: ~jnp.any(jnp.isnan(scores)), "a score is a number or infinite, not NaN")
    impls = {"reference": reference.run, "gpu": gpu.run}
    return dispatch.run("mark_topk", impl, impls, scores, k.astype(jnp.int32))
