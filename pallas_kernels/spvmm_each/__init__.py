"""Products of one input with several matrices, each of which leaves out what is below a level of its own."""

from collections.abc import Sequence

from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch
from pallas_kernels.sparse_matvec import check_weights
from pallas_kernels.spvmm_each import gpu, reference, tpu

__all__ = ["spvmm_each"]


def spvmm_each(
    x: Float[Array, "B F"],
    ws: Sequence[Shaped[Array, "F _"]],
    levels: Sequence[Float[Array, ""] | None],
    *,
    scales: Sequence[Array | None] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B _"], ...]:
    """Returns what `spvmm` makes of x and each matrix with its level, in one launch for one batch row.

    Args:
        x: activations; kernels take batches up to 8.
        ws: weights [F M] of x's type, or int8, all of one type.
        levels: of each matrix: what |x| is compared with; None for all of x.
        scales: of int8 weights, one per output channel of each matrix, [M]; None for other weights.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes, types or numbers of them that disagree.
        TypeError: for weights that are neither floats nor int8.
        NotImplementedError: for a type or batch without a kernel, where impl names one.

    Source: as `spvmm`. Ours: that a sparse product and dense ones of the same input share a launch.

    Cost: reads M elements of each w per row that it needs; 2·B·M FLOPs each.

    Example:
        >>> import jax.numpy as jnp
        >>> x, w = jnp.array([[0.5, 2.0]]), jnp.array([[1.0], [1.0]])
        >>> [y.tolist() for y in spvmm_each(x, (w, w), (jnp.float32(1), None))]
        [[[2.0]], [[2.5]]]
    """
    scales = (None,) * len(ws) if scales is None else tuple(scales)
    if not len(ws) == len(levels) == len(scales) or len({w.dtype for w in ws}) != 1:
        raise ValueError(
            f"each matrix has a level and maybe a scale, and all are of one type, got {len(ws)} of "
            f"{[str(w.dtype) for w in ws]}, {len(levels)} levels and {len(scales)} scales"
        )
    for w, scale in zip(ws, scales, strict=True):
        check_weights(x, x, w, scale, w.shape[1])
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("spvmm_each", impl, impls, x, tuple(ws), tuple(levels), scales)
