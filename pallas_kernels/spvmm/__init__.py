"""Product of activations, most of them 0, with a matrix of which only the rows they need are read."""

from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch
from pallas_kernels.sparse_matvec import check_weights
from pallas_kernels.spvmm import gpu, reference, tpu

__all__ = ["spvmm"]


def spvmm(
    x: Float[Array, "B F"],
    w: Shaped[Array, "_ M"],
    level: Float[Array, ""] | None = None,
    *,
    scale: Float[Array, "..."] | None = None,
    impl: str | None = None,
) -> Float[Array, "B M"]:
    """Returns x·w, where row f of w is not read if x[:, f] is 0 in the whole batch, or below the level.

    Rows not read may hold anything, NaN too. Sums are in float32. On a TPU a block of rows is
    skipped when all its rows are; other rows without need are read there, and still not used.

    Args:
        x: activations, most of them 0; kernels take batches up to 8.
        w: weights [F M] of x's type, or int8.
        level: what |x| is compared with; what is below counts as 0. None for 0.
        scale: of int8 weights, one per output channel, [M].
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree, or scales without int8 weights, or those without scales.
        TypeError: for weights that are neither floats nor int8.
        NotImplementedError: for a type or batch without a kernel, where impl names one.

    Source: CHESS (arXiv 2409.01366), spvmm. Deviation: batches, by the union of their rows.

    Cost: reads M elements of w per row in use; 2·B·M FLOPs each.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[0.0, 2.0, 0.0]])
        >>> w = jnp.array([[jnp.nan, jnp.nan], [1.0, 2.0], [jnp.nan, jnp.nan]])
        >>> spvmm(x, w).tolist()
        [[2.0, 4.0]]
    """
    check_weights(x, x, w, scale, w.shape[1])
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("spvmm", impl, impls, x, w, level, scale)
