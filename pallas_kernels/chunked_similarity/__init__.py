"""For every slot of a chunk, the most similar slot that it may be merged into."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.chunked_similarity import gpu, reference, tpu

__all__ = ["chunked_similarity"]


def chunked_similarity(
    k: Float[Array, "B R D"],
    mass: Float[Array, "B R"],
    *,
    slots: tuple[int, ...],
    chunk: int,
    stride: int = 2,
    kind: str = "cosine",
    impl: str | None = None,
) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
    """Returns (best, similarity) of bipartite soft matching inside chunks of each head.

    Chunks of `chunk` slots are counted from each head's first slot; a head's last may be shorter.
    The last of every `stride` slots of a chunk, those at stride - 1, 2·stride - 1, ..., are
    destinations and the others sources: with stride 2, even slots merge into odd ones. best is the
    destination most similar to a source, as a slot of the head (of equal ones the earliest), and
    similarity how similar, in float32. For destinations, empty slots and sources without a
    destination they are -1 and -inf, so a top-r over a head's similarities picks its merges.

    Args:
        k: keys, float32, bfloat16 or float16.
        mass: tokens that each slot stands for; a slot of mass 0 is neither source nor destination,
            whatever it holds. Pass 0 for slots that must stay as they are.
        slots: capacity of each head; R = Σ slots.
        chunk: slots per chunk.
        stride: a pass of merges leaves at least 1/stride of the slots.
        kind: "cosine" (0 for a key of zeros), "dot", or "l2": minus the squared distance.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree, a chunk without destination, or an unknown kind; in
            debug mode a mass that is negative or NaN.
        NotImplementedError: for a type or size without a kernel, where impl names one.

    Source: Chelsea (arXiv 2506.11418), chunked soft matching. With chunk S and stride 2 it is Token
    Merging (arXiv 2210.09461), appendix D. Deviation: slots are told apart by their place, not by
    their rank among the slots that are not empty.

    Cost: reads B·R·D elements and B·R masses, writes 8 bytes per slot; 2·B·R·c·D·(s-1)/s² FLOPs.
    Nothing quadratic is stored. On TPU the keys are copied first unless heads and chunk are
    multiples of 16, and the FLOPs are 2·B·R·c·D.

    Example:
        >>> k = jnp.array([[[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.0]]])
        >>> best, similarity = chunked_similarity(k, jnp.ones((1, 4)), slots=(4,), chunk=4)
        >>> best[0].tolist(), similarity[0].tolist()
        ([3, -1, 1, -1], [1.0, -inf, 1.0, -inf])
    """
    if kind not in reference.KINDS:
        raise ValueError(f"kind is one of {', '.join(reference.KINDS)}, got {kind=}")
    if not 2 <= stride <= chunk:
        raise ValueError(
            f"a chunk has sources and a destination: 2 <= stride <= chunk, got {stride=}, {chunk=}"
        )
    if not slots or min(slots) < 1 or k.shape[1] != sum(slots):
        raise ValueError(
            f"k has a row per slot of each head, got {k.shape=}: {slots=} are positive and sum to R"
        )
    if mass.shape != k.shape[:2]:
        raise ValueError(f"there is one mass per slot, {k.shape[:2]}, got {mass.shape=}")
    debug_check(lambda: jnp.all(mass >= 0), "a mass is a number of tokens: it is not negative and not NaN")
    chunk = min(chunk, max(stride, *slots))
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    options = {"slots": slots, "chunk": chunk, "stride": stride, "kind": kind}
    return dispatch.run("chunked_similarity", impl, impls, k, mass, **options)
