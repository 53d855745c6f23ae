"""The smallest and largest key of every block of slots, per channel."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.block_bounds import gpu, reference, tpu

__all__ = ["block_bounds"]


def block_bounds(
    k: Float[Array, "B R D"],
    mass: Float[Array, "B R"],
    *,
    slots: tuple[int, ...],
    block: int,
    impl: str | None = None,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """Returns (low, high): the minimum and maximum of the keys of each block, in k's type.

    Blocks are counted from each head's first slot, so a head of S slots has ⌈S/P⌉ and its last may
    be shorter; the blocks of all heads lie one after the other, head after head. A slot of mass 0
    does not count, whatever it holds; a block of none but those has low = inf > high = -inf.

    Args:
        k: keys as the queries will meet them (rotated), float32, bfloat16 or float16.
        mass: tokens that each slot stands for.
        slots: capacity of each head; R = Σ slots.
        block: P, slots per block.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree; in debug mode a mass that is negative or NaN.
        NotImplementedError: for a type or size without a kernel, where impl names one.

    Source: Quest (arXiv 2406.10774), section 3.2; the leaves of LeoAM's abstracts (arXiv
    2506.20187), whose parents are the minimum and maximum of their children.

    Cost: reads B·R·D elements and B·R masses, writes 2/P of the elements. On TPU the keys are
    copied first unless P is a power of 2 from 8 on and every head holds whole blocks.

    Example:
        >>> k = jnp.array([[[1.0, 5.0], [3.0, 2.0], [4.0, 4.0]]])
        >>> low, high = block_bounds(k, jnp.ones((1, 3)), slots=(3,), block=2)
        >>> low[0].tolist(), high[0].tolist()
        ([[1.0, 2.0], [4.0, 4.0]], [[3.0, 5.0], [4.0, 4.0]])
    """
    if block < 1:
        raise ValueError(f"a block has at least 1 slot, got {block=}")
    if not slots or min(slots) < 1 or k.shape[1] != sum(slots):
        raise ValueError(
            f"k has a row per slot of each head, got {k.shape=}: {slots=} are positive and sum to R"
        )
    if mass.shape != k.shape[:2]:
        raise ValueError(f"there is one mass per slot, {k.shape[:2]}, got {mass.shape=}")
    debug_check(lambda: jnp.all(mass >= 0), "a mass is a number of tokens: it is not negative and not NaN")
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("block_bounds", impl, impls, k, mass, slots=slots, block=block)
