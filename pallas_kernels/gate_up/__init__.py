"""The first half of a gated feed-forward block whose gate is sparse: gate and up in one."""

from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch
from pallas_kernels.gate_up import gpu, reference, tpu
from pallas_kernels.sparse_matvec import check_scale

__all__ = ["gate_up"]


def gate_up(
    x: Float[Array, "B M"],
    gate_t: Shaped[Array, "_ M"],
    up_t: Shaped[Array, "_ M"],
    level: Float[Array, ""],
    weight: Float[Array, " F"] | None = None,
    *,
    scales: tuple[Array, Array] | None = None,
    act: str = "silu",
    impl: str | None = None,
) -> Float[Array, "B F"]:
    """Returns g·(x·up_tᵀ) of g = act(x·gate_tᵀ) where |g|·weight >= level, and 0 elsewhere.

    Row f of up_t is not read if g[:, f] is below the level in the whole batch; it may then hold
    anything, NaN too. Sums are in float32; g is rounded to x's type before and after act. On a TPU a
    block of rows is skipped when all its rows are.

    Args:
        x: activations; kernels take batches up to 8.
        gate_t: weights of the gate [F M], the transpose of the projection's, of x's type, or int8.
        up_t: weights of up [F M], of the same type.
        level: what |g|·weight is compared with; 0 leaves out nothing.
        weight: of each channel; None for 1.
        scales: of int8 weights, those of the gate and those of up, one per output channel, [F] each.
        act: "silu" or "gelu_tanh".
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes or types that disagree, scales without int8 weights, or those without
            scales, or an act of another name.
        TypeError: for weights that are neither floats nor int8.
        NotImplementedError: for a type or batch without a kernel, where impl names one.

    Source: CHESS (arXiv 2409.01366), vmmsp. Ours: that the kernel computes the gate too; batches, by the
    union of their rows.

    Cost: reads M elements of gate_t per row, and M of up_t per row in use; 2·B·M FLOPs each.

    Example:
        >>> import jax.numpy as jnp
        >>> x, gate_t = jnp.array([[1.0, 2.0]]), jnp.array([[0.1, 0.0], [2.0, 1.0]])
        >>> up_t = jnp.array([[jnp.nan, jnp.nan], [1.0, 1.0]])
        >>> gate_up(x, gate_t, up_t, jnp.float32(0.5)).round(2).tolist()
        [[0.0, 11.779999732971191]]
    """
    if act not in reference.ACTS:
        raise ValueError(f"an act is one of {', '.join(reference.ACTS)}, got {act=}")
    if gate_t.shape != up_t.shape or gate_t.dtype != up_t.dtype or gate_t.shape[1] != x.shape[1]:
        raise ValueError(
            f"weights of gate and up have a row per channel and a column per channel of x, {x.shape[1]}, and "
            f"are of one type, got {gate_t.shape} {gate_t.dtype} and {up_t.shape} {up_t.dtype}"
        )
    if weight is not None and weight.shape != gate_t.shape[:1]:
        raise ValueError(f"there is one weight per channel, {gate_t.shape[0]}, got {weight.shape=}")
    for w, scale in zip((gate_t, up_t), scales or (None, None), strict=True):
        check_scale(w, scale, w.shape[0])
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("gate_up", impl, impls, x, gate_t, up_t, level, weight, scales, act=act)
