"""The indices that the query heads of a KV head choose together, ascending."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.union_topk import gpu, reference, tpu

__all__ = ["union_topk"]


def union_topk(
    scores: Float[Array, "B K G S"], k: int, *, limit: int | None = None, impl: str | None = None
) -> Int[Array, "B K limit"]:
    """Returns the union over the G query heads of the indices of each one's k largest scores, ascending.

    Each head chooses as in `select_topk`. A member's rank is the largest score that any head of the
    group gives it, whether or not that head chose it. Where there are more than `limit` members, the
    `limit` of largest rank stay, of equal ranks the first; where there are fewer, -1 fills the end.

    Args:
        scores: float32, bfloat16 or float16; -inf where there is nothing to choose. A CPU may take
            subnormal numbers for zeros where it compares heads.
        k: how many each query head chooses, from 1 to S; static.
        limit: room for the union, from 1 to S; None for what always fits, the lesser of G·k and S.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for a k or limit below 1 or above S; in debug mode for a NaN.
        NotImplementedError: for a type or size without a kernel, where impl names one.

    Source: A2ATS (arXiv 2502.12665), whose paper selects per query head; KV heads read the union.

    Cost: reads the scores twice, the second time from cache where they fit, and writes limit indices
    per KV head.

    Example:
        >>> scores = jnp.asarray([[[[5.0, 1.0, 4.0, 0.0], [0.0, 9.0, 8.0, 7.0]]]])
        >>> union_topk(scores, 2)
        Array([[[ 0,  1,  2, -1]]], dtype=int32)
        >>> union_topk(scores, 2, limit=2)
        Array([[[1, 2]]], dtype=int32)
    """
    group, size = scores.shape[2:]
    if not 1 <= k <= size:
        raise ValueError(f"a row has from 1 to S choices, got {k=} for {scores.shape=}: lower k")
    limit = min(group * k, size) if limit is None else limit
    if not 1 <= limit <= size:
        raise ValueError(f"a union has from 1 to S members, got {limit=} for {scores.shape=}: lower limit")
    debug_check(lambda: ~jnp.any(jnp.isnan(scores)), "a score is a number or infinite, not NaN")
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("union_topk", impl, impls, scores, k=k, limit=limit)
