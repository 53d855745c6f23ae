"""Scores of slots by the codewords that stand for their keys."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.vq_scores import gpu, reference, tpu
from pallas_kernels.vq_scores.reference import ALWAYS

__all__ = ["ALWAYS", "vq_scores"]


def vq_scores(
    q: Float[Array, "B K G D"],
    codebook: Float[Array, "K C D"],
    codes: Int[Array, "B K S"],
    *,
    reduce: str | None = None,
    dtype: Any = jnp.float32,
    impl: str | None = None,
) -> Float[Array, "B K G S"] | Float[Array, "B K S"]:
    """Returns q·codebook[code] for every query head and slot, -inf for code -1 and inf for `ALWAYS`.

    Args:
        q: queries in the frame of the codebook: un-rotated, or times R_b for far keys.
        codebook: the codewords of each KV head, at most 32,768.
        codes: int16, the codeword of each slot; -1 for an empty slot, `ALWAYS`, -2, for one that ranks
            above all others.
        reduce: "max" takes the largest score over the G query heads of a KV head: [B K S].
        dtype: of the scores: float32, bfloat16 or float16. They are rounded to it once.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree, another reduce or dtype; in debug mode for a code
            that the codebook does not have.
        TypeError: for codes that are not int16.
        NotImplementedError: for a type or size without a kernel, where impl names one.

    Source: A²ATS (arXiv 2502.12665), steps 2 and 3 of decoding: a table of all codewords' scores,
    then a look-up. The maximum is taken in the table, which gives the same.

    Cost: reads K·C·D elements and B·K·S codes, writes B·K·G·S scores; 2·B·K·G·C·D FLOPs.

    Example:
        >>> q, codebook = jnp.ones((1, 1, 2, 4)), jnp.arange(3.0)[None, :, None] * jnp.ones((1, 3, 4))
        >>> vq_scores(q, codebook, jnp.array([[[2, 0, -1, -2]]], jnp.int16)).tolist()
        [[[[8.0, 0.0, -inf, inf], [8.0, 0.0, -inf, inf]]]]
    """
    n_heads, n_codes, size = codebook.shape
    if (q.shape[1], q.shape[3]) != (n_heads, size):
        raise ValueError(
            f"q is [B K G D] and codebook [K C D] with the same K and D, got {q.shape=} and {codebook.shape=}"
        )
    if codes.shape[:2] != q.shape[:2]:
        raise ValueError(f"there are codes [B K S] for each KV head of q, got {codes.shape=} and {q.shape=}")
    if codes.dtype != jnp.int16:
        raise TypeError(f"codes are int16, got {codes.dtype}: use codes.astype(jnp.int16)")
    if not 1 <= n_codes <= 2**15:
        raise ValueError(f"codes are int16, so a codebook has 1 to 32,768 codewords, got C={n_codes}")
    if reduce not in (None, "max"):
        raise ValueError(f'reduce is None or "max", got {reduce=}')
    if jnp.dtype(dtype).name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"scores are float32, bfloat16 or float16, got {jnp.dtype(dtype)}")
    debug_check(lambda: jnp.all(codes < n_codes), "a code is the index of a codeword")
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    options = {"reduce": reduce, "dtype": jnp.dtype(dtype)}
    return dispatch.run("vq_scores", impl, impls, q, codebook, codes, **options)
