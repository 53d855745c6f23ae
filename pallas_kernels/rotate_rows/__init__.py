"""Rotates the rows of a cache by their positions (rotary position embedding), or back."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.rotate_rows import gpu, reference

__all__ = ["rotate_rows"]


def rotate_rows(
    x: Float[Array, "B R D"],
    pos: Int[Array, "B R"],
    frequencies: Float[Array, " D/2"],
    *,
    factor: float = 1.0,
    back: bool = False,
    impl: str | None = None,
) -> Float[Array, "B R D"]:
    """Returns each row rotated by its position, in x's type; channel i turns with channel i + D/2.

    Args:
        x: rows, float32, bfloat16 or float16.
        frequencies: radians a token.
        factor: of cosines and sines.
        back: undo it.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs.

    Raises:
        ValueError: for shapes that disagree.
        NotImplementedError: for a type without a kernel, where impl names one.

    Source: RoFormer (arXiv 2104.09864), with the half-split pairing of Hugging Face checkpoints.

    Cost: reads and writes B·R·D elements. XLA stores the cosines and sines of all rows in between, in
    float32, twice the bytes of bfloat16 rows.

    Example:
        >>> import jax.numpy as jnp
        >>> x, pos = jnp.asarray([[[1.0, 0.0]]]), jnp.asarray([[2]])
        >>> rotate_rows(x, pos, jnp.asarray([jnp.pi / 4])).round(3).tolist()
        [[[-0.0, 1.0]]]
    """
    if pos.shape != x.shape[:2] or 2 * frequencies.size != x.shape[2] or frequencies.ndim != 1:
        raise ValueError(
            f"each row has a position and each two channels a frequency, got {pos.shape=} and "
            f"{frequencies.shape=} for {x.shape=}"
        )
    impls = {"reference": reference.run, "gpu": gpu.run}
    return dispatch.run("rotate_rows", impl, impls, x, pos, frequencies, factor=factor, back=back)
