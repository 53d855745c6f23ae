"""Product of a gate, mostly 0, with a projection of which only the outputs it lets through are computed."""

from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch
from pallas_kernels.sparse_matvec import check_weights
from pallas_kernels.vmmsp import gpu, reference, tpu

__all__ = ["vmmsp"]


def vmmsp(
    x: Float[Array, "B M"],
    gate: Float[Array, "B F"],
    w_t: Shaped[Array, "_ _"],
    *,
    scale: Float[Array, "..."] | None = None,
    impl: str | None = None,
) -> Float[Array, "B F"]:
    """Returns gate·(x·w_tᵀ), where row f of w_t is not read if gate[:, f] is 0 in the whole batch.

    The output is exactly 0 where the gate is. Rows not read may hold anything, NaN too. Sums are
    in float32. On a TPU a block of rows is skipped when all its rows are.

    Args:
        x: activations.
        gate: factors of the outputs, most of them exactly 0, of x's type; kernels take batches up to 8.
        w_t: weights [F M], the transpose of the projection's [M F], of x's type, or int8.
        scale: of int8 weights, one per output channel, [F].
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes or types that disagree, or scales without int8 weights, or those
            without scales.
        TypeError: for weights that are neither floats nor int8.
        NotImplementedError: for a type or batch without a kernel, where impl names one.

    Source: CHESS (arXiv 2409.01366), vmmsp. Deviation: batches, by the union of their rows.

    Cost: reads M elements of w_t per row in use; 2·B·M FLOPs each.

    Example:
        >>> import jax.numpy as jnp
        >>> x, gate = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 3.0]])
        >>> vmmsp(x, gate, jnp.array([[jnp.nan, jnp.nan], [1.0, 1.0]])).tolist()
        [[0.0, 9.0]]
    """
    if w_t.shape[1] != x.shape[1]:
        raise ValueError(
            f"weights have a column per channel of x, {x.shape[1]}, got {w_t.shape=}: "
            f"they lie as [F M], the transpose of the projection"
        )
    check_weights(x, gate, w_t, scale, w_t.shape[0])
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("vmmsp", impl, impls, x, gate, w_t, scale)
