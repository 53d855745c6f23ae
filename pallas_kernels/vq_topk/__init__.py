"""The slots that a KV head's query heads choose by the codewords that stand for their keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.vq_topk import gpu, reference, tpu
from pallas_kernels.vq_topk.reference import histogram, marked

__all__ = ["histogram", "marked", "vq_topk"]


def vq_topk(
    q: Float[Array, "B K G D"],
    codebook: Float[Array, "K C D"],
    codes: Int[Array, "B K S"],
    counts: Int[Array, "B K C"],
    n: Int[Array, " B"],
    *,
    k: int,
    n_always: int = 0,
    impl: str | None = None,
) -> Int[Array, "B K N"]:
    """Returns, ascending, the slots of largest q·codebook[code] of any query head, and those marked.

    Each query head chooses n slots; of equal scores the first. A KV head's choice is the union over its
    group; -1 fills the N = min(G·k + n_always, S) places.

    Args:
        q: queries in the frame of the codebook.
        codebook: the codewords of each KV head, at most 32,766.
        codes: int16, the codeword of each slot; -1 for an empty slot. `marked(code)`, -2 or less, takes a
            slot whatever its score; it is none of the n.
        counts: how many slots have each code, see `histogram`: a cache counts as it grows.
        n: how many slots each query head of a row chooses, at most k.
        k: the most that n may be; static.
        n_always: the most slots of a head that are marked; static.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree, a k or n_always out of range; in debug mode for a code that the
            codebook does not have, counts of other codes, an n above k, or more slots marked than n_always.
        TypeError: for codes that are not int16.
        NotImplementedError: for a type or size without a kernel, where impl names one.

    Source: A²ATS (arXiv 2502.12665), decoding: scores by a look-up, then the largest. Scores of slots are
    never written: slots of one code have one score, so that a head's n-th largest is found among codewords.

    Cost: reads K·C·D elements, B·K·C counts and B·K·S codes, twice on a GPU; 2·B·K·G·C·D FLOPs.

    Example:
        >>> q, codebook = jnp.ones((1, 1, 1, 4)), jnp.arange(3.0)[None, :, None] * jnp.ones((1, 3, 4))
        >>> codes = jnp.array([[[2, -1, 0, 2, 1, 2, marked(0)]]], jnp.int16)
        >>> vq_topk(q, codebook, codes, histogram(codes, 3), jnp.array([2]), k=3, n_always=1).tolist()
        [[[0, 3, 6, -1]]]
    """
    n_heads, n_codes, size = codebook.shape
    if (q.shape[1], q.shape[3]) != (n_heads, size):
        raise ValueError(
            f"q is [B K G D] and codebook [K C D] with the same K and D, got {q.shape=} and {codebook.shape=}"
        )
    if codes.shape[:2] != q.shape[:2] or counts.shape != (*q.shape[:2], n_codes) or n.shape != q.shape[:1]:
        raise ValueError(
            "there are codes [B K S], counts [B K C] and n [B] for the rows and heads of q [B K G D], got "
            f"{codes.shape=}, {counts.shape=} and {n.shape=} for {q.shape=} and C={n_codes}"
        )
    if codes.dtype != jnp.int16:
        raise TypeError(f"codes are int16, got {codes.dtype}: use codes.astype(jnp.int16)")
    if not 1 <= n_codes <= 2**15 - 2:
        raise ValueError(f"codes and marked ones are int16, so a codebook has 1 to 32,766, got C={n_codes}")
    if not (1 <= k <= codes.shape[2] and 0 <= n_always <= codes.shape[2]):
        raise ValueError(
            f"a head chooses 1 to S slots, and marks 0 to S, got {k=} and {n_always=} for S={codes.shape[2]}"
        )
    debug_check(lambda: jnp.all(codes < n_codes), "a code is below the number of codewords")
    debug_check(lambda: jnp.all(counts == histogram(codes, n_codes)), "counts are not those of the codes")
    debug_check(lambda: jnp.all(n <= k), "a query head chooses at most k slots")
    debug_check(lambda: jnp.all((codes < -1).sum(2) <= n_always), "more slots are marked than n_always")
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("vq_topk", impl, impls, q, codebook, codes, counts, n, k=k, n_always=n_always)
