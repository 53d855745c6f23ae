"""Root mean square normalisation of few rows, in one launch."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.rms_norm import gpu, reference

__all__ = ["rms_norm"]


def rms_norm(
    x: Float[Array, "B M"], scale: Float[Array, "..."], *, eps: float, impl: str | None = None
) -> Float[Array, "B M"]:
    """Returns x / sqrt(mean x² + eps) · scale in x's type, computed in float32.

    XLA makes one kernel of it where there are many rows, and two of a single one. TPUs have the reference.

    Args:
        x: the rows.
        scale: of each channel.
        eps: is added to the mean square.
        impl: None, "reference" or "gpu", see `dispatch`.

    Raises:
        ValueError: for scales of another length.
        NotImplementedError: for rows of more than 32,768 channels, where impl names the kernel.

    Source: root mean square layer normalisation (arXiv 1910.07467).

    Cost: reads and writes B·M elements.

    Example:
        >>> import jax.numpy as jnp
        >>> rms_norm(jnp.array([[3.0, -3.0]]), jnp.array([1.0, 2.0]), eps=0.0).tolist()
        [[1.0, -2.0]]
    """
    if scale.shape != x.shape[1:]:
        raise ValueError(f"there is one scale per channel, {x.shape[1:]}, got {scale.shape=}")
    impls = {"reference": reference.run, "gpu": gpu.run}
    return dispatch.run("rms_norm", impl, impls, x, scale, eps=eps)
