"""The nearest codeword of every vector, with a codebook per KV head."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int16

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.vq_assign import gpu, reference, tpu

__all__ = ["vq_assign"]


def vq_assign(
    x: Float[Array, "B K T D"], codebook: Float[Array, "K C D"], *, impl: str | None = None
) -> Int16[Array, "B K T"]:
    """Returns argmin_c ‖x − codebook_c‖² for every vector, the lowest of equal ones.

    The distance is the plain one. Another metric, (x − c) A Aᵀ (x − c)ᵀ, is had by giving x @ A and
    a codebook in that space. A vector with a NaN gets code 0.

    Args:
        x: the vectors: the keys of a prompt or of one new token, or the samples of a k-means step.
        codebook: the codewords of each KV head, at most 32,768, all finite.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree or codes that int16 does not hold; in debug mode for a
            codeword that is not finite.
        NotImplementedError: for a type or head size without a kernel, where impl names one.

    Source: A²ATS (arXiv 2502.12665), the code of a key; ‖x‖² is left out, as it moves no minimum.

    Cost: 2·B·K·T·C·D FLOPs; reads B·K·T·D and K·C·D elements, writes B·K·T codes.

    Example:
        >>> codebook = jnp.array([[[0.0, 0.0], [1.0, 1.0]]])
        >>> vq_assign(jnp.array([[[[0.9, 0.8], [0.1, -3.0]]]]), codebook).tolist()
        [[[1, 0]]]
    """
    n_heads, n_codes, size = codebook.shape
    if (x.shape[1], x.shape[3]) != (n_heads, size):
        raise ValueError(
            f"x is [B K T D] and codebook [K C D] with the same K and D, got {x.shape=} and {codebook.shape=}"
        )
    if not 1 <= n_codes <= 2**15:
        raise ValueError(f"codes are int16, so a codebook has 1 to 32,768 codewords, got C={n_codes}")
    debug_check(lambda: jnp.all(jnp.isfinite(codebook)), "codewords are finite")
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("vq_assign", impl, impls, x, codebook)
