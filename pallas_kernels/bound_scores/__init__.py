"""Bounds of q·k over blocks of slots, from the blocks' smallest and largest keys."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.bound_scores import gpu, reference, tpu

__all__ = ["bound_scores"]


def bound_scores(
    q: Float[Array, "B K G D"],
    low: Float[Array, "B N D"],
    high: Float[Array, "B N D"],
    *,
    n_blocks: tuple[int, ...],
    lower: bool = False,
    impl: str | None = None,
) -> Float[Array, "B N"] | tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Returns max_g Σ_d max(q_gd·low_d, q_gd·high_d) of every block, over its head's queries.

    No q_g·k in the block is above it. With lower, also max_g Σ_d min(q_gd·low_d, q_gd·high_d):
    every key of the block scores at least that with one query head of the group (the one that
    reaches the maximum), so a block whose lower bound passes a threshold can be taken whole. Both
    are -inf for a block without keys (low > high in any channel), which is then never taken.

    Args:
        q: queries rotated as the keys were, float32, bfloat16 or float16.
        low, high: bounds as `block_bounds` gives them, packed head after head.
        n_blocks: blocks of each KV head; N = Σ n_blocks.
        lower: also return the lower bound.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree.
        NotImplementedError: for a type or head size without a kernel, where impl names one.

    Source: Quest (arXiv 2406.10774), section 3.3; the upper and lower bound of LeoAM (arXiv
    2506.20187). Deviation: the heads of a group share their KV head's blocks.

    Cost: reads 2·B·N·D elements, writes B·N float32; 4·B·G·N·D FLOPs per bound, as
    Σ max(q·low, q·high) = max(q, 0)·high + min(q, 0)·low.

    Example:
        >>> import jax.numpy as jnp
        >>> q = jnp.array([[[[1.0, -2.0]]]])
        >>> low, high = jnp.array([[[0.0, 1.0]]]), jnp.array([[[3.0, 4.0]]])
        >>> [x.tolist() for x in bound_scores(q, low, high, n_blocks=(1,), lower=True)]
        [[[1.0]], [[-8.0]]]
    """
    if len(n_blocks) != q.shape[1] or min(n_blocks) < 1:
        raise ValueError(
            f"there is one positive number of blocks per KV head, got {n_blocks=} for {q.shape=}"
        )
    shape = (q.shape[0], sum(n_blocks), q.shape[3])
    if low.shape != shape or high.shape != shape:
        raise ValueError(
            f"low and high have a row per block and the head size of q, {shape}, got {low.shape=} and "
            f"{high.shape=}: n_blocks sum to N, and q is [B K G D]"
        )
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("bound_scores", impl, impls, q, low, high, n_blocks=n_blocks, lower=lower)
