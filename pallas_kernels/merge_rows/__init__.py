"""Merges rows of a cache into others and packs what is left."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.backend import debug_check
from pallas_kernels.merge_rows import gpu, reference

__all__ = ["MergeForm", "Merged", "merge_rows"]


@dataclass(frozen=True)
class MergeForm:
    """What a merge has that is static.

    slots: capacity of each KV head; R = Σ slots. most: rows of a batch row that go into others, at most.
    reach: rows from the first that goes into a row to the last, at most; None for all of a head.
    factor: of the cosines and sines of a rotary embedding.
    """

    slots: tuple[int, ...]
    most: int
    reach: int | None = None
    factor: float = 1.0


class Merged(NamedTuple):
    """The rows that are left; empty ones are 0."""

    rows: tuple[Float[Array, "B Q D"], ...]
    n: Float[Array, "B Q"]
    pos: Int[Array, "B Q"] | None


def merge_rows(
    rows: tuple[Float[Array, "B R D"], ...],
    n: Float[Array, "B R"],
    old: Int[Array, "B Q"],
    into: Int[Array, "B R"],
    pos: Int[Array, "B R"] | None = None,
    frequencies: Float[Array, " D/2"] | None = None,
    *,
    form: MergeForm,
    impl: str | None = None,
) -> Merged:
    """Returns of each new row j the mean of old[j] and of the rows that go into it, weighted by n.

        n' = n_b + Σ n_a      x' = (n_b x_b + Σ n_a x_a) / n'      the position alike, rounded

    Sums are float32, in the order of rows, and a row that nothing goes into keeps its bits.

    Args:
        rows: arrays of floats.
        n: tokens that each row stands for.
        old: the row that each new one continues, -1 where it is empty.
        into: the row of the same head that each goes into, which itself stays; R for those that stay.
        pos: the position of each row.
        frequencies: of a rotary embedding, by which rows[0] are rotated to their positions: they are averaged
            before it, and rotated to the mean position. None: as they are.
        form: capacities of the heads, how many merge and from where.
        impl: None, "reference" or "gpu", see `dispatch`. On TPU the reference runs: XLA gathers and adds.

    Raises:
        ValueError: for shapes that disagree, or frequencies without positions.
        NotImplementedError: for a type or size without a kernel, where impl names one.

    Source: Token Merging (arXiv 2210.09461), as Chelsea (arXiv 2506.11418) has it.

    Cost: reads B·(Q + M)·D elements of each array and writes B·Q·D. On a GPU B·R·reach integers are
    compared, or those of a head sorted, whichever is less.

    Example:
        >>> import jax.numpy as jnp
        >>> x, n = jnp.asarray([[[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]]]), jnp.asarray([[1.0, 3.0, 1.0]])
        >>> into = jnp.asarray([[1, 3, 3]])
        >>> merge_rows((x,), n, jnp.asarray([[1, 2]]), into, form=MergeForm((3,), 1)).rows[0][0].tolist()
        [[2.5, 3.0], [9.0, 9.0]]
    """
    for x in rows:
        if x.ndim != 3 or x.shape[:2] != n.shape:
            raise ValueError(f"there is one n per row, got {x.shape} for {n.shape=}")
    if into.shape != n.shape or len(old) != len(n) or sum(form.slots) != n.shape[1]:
        raise ValueError(
            f"each row goes into one or stays, got {into.shape=} and {old.shape=} for {n.shape=} and "
            f"{form.slots=}"
        )
    if frequencies is not None and (pos is None or frequencies.shape != (rows[0].shape[2] // 2,)):
        raise ValueError(
            "a rotation has positions and a frequency for each two channels, got "
            f"{None if pos is None else pos.shape} and {frequencies.shape} for {rows[0].shape}"
        )
    debug_check(lambda: jnp.all((into < n.shape[1]).sum(1) <= form.most), "more rows merge than form.most")
    impls = {"reference": reference.run, "gpu": gpu.run}
    return Merged(*dispatch.run("merge_rows", impl, impls, rows, n, old, into, pos, frequencies, form=form))
