"""The indices of the k largest scores of each row, ascending."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.select_topk import gpu, reference, tpu

__all__ = ["select_topk"]


def select_topk(scores: Float[Array, "*rows S"], k: int, *, impl: str | None = None) -> Int[Array, "*rows k"]:
    """Returns the indices of the k largest scores of each row, in ascending order of index.

    Of equal scores the first are chosen, as by `lax.top_k`, whose order of floats holds: -0.0 is
    below 0.0. A score of -inf is never chosen: where fewer than k are above it, -1 fills the end.

    Args:
        scores: float32, bfloat16 or float16.
        k: how many to choose, from 1 to S; static.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for k below 1 or above S; in debug mode for a NaN.
        NotImplementedError: for a type or size without a kernel, where impl names one.

    Source: the selection step of A2ATS (arXiv 2502.12665), Quest (arXiv 2406.10774) and LeoAM
    (arXiv 2506.20187). The threshold is bisected over float bits, from a sampled guess on GPU.

    Cost: reads the scores once and writes k indices per row.

    Example:
        >>> select_topk(jnp.asarray([[3.0, 1.0, 2.0, 3.0], [-jnp.inf, 0.0, -jnp.inf, -jnp.inf]]), 2)
        Array([[ 0,  3],
               [ 1, -1]], dtype=int32)
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"a row has from 1 to S choices, got {k=} for {scores.shape=}: lower k")
    debug_check(lambda: ~jnp.any(jnp.isnan(scores)), "a score is a number or infinite, not NaN")
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("select_topk", impl, impls, scores, k=k)
