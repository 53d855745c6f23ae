"""A residual's sum and its norm, in one."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.add_norm import gpu, reference

__all__ = ["add_norm"]


def add_norm(
    x: Float[Array, "B M"],
    y: Float[Array, "B M"],
    scale: Float[Array, " M"],
    *,
    eps: float,
    impl: str | None = None,
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """Returns x + y, and that over its root mean square, times the scale.

    The sum is rounded to x's type first; its norm is computed in float32.

    Args:
        x: the residual stream.
        y: what is added, of the same type.
        scale: float32.
        eps: added to the mean of the squares.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs: XLA fuses it.

    Raises:
        ValueError: for shapes or types that disagree.
        NotImplementedError: for rows that are too long, where impl names a kernel.

    Source: RMSNorm (arXiv 1910.07467).

    Cost: reads 2·B·M elements and writes as many, in one launch.

    Example:
        >>> import jax.numpy as jnp
        >>> total, normed = add_norm(jnp.ones((1, 4)), 2 * jnp.ones((1, 4)), jnp.ones(4), eps=0.0)
        >>> total.tolist(), normed.tolist()
        ([[3.0, 3.0, 3.0, 3.0]], [[1.0, 1.0, 1.0, 1.0]])
    """
    if x.shape != y.shape or x.dtype != y.dtype or scale.shape != x.shape[1:]:
        raise ValueError(
            f"x and y are alike, and the scale is a row, got {x.shape} {x.dtype}, {y.shape} {y.dtype} and "
            f"{scale.shape=}"
        )
    impls = {"reference": reference.run, "gpu": gpu.run}
    return dispatch.run("add_norm", impl, impls, x, y, scale, eps=eps)
