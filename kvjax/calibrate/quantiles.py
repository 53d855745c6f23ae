"""Finds exact quantiles of any number of values by counting them twice.

The bits of floats that are not negative are in the order of the floats. So a first count by the upper 15 of
their 31 bits says in which bin a rank lies, and a second one by the lower 16 bits, of that bin alone, which
value it is. Memory is that of the counts, whatever is counted.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["N_COARSE", "N_FINE", "bin_of", "coarse", "fine", "value_of"]

N_COARSE, N_FINE = 2**15, 2**16


def coarse(values: Float[Array, "..."]) -> Int[Array, " N"]:
    """Counts values by their upper bits; none is negative or NaN."""
    return jnp.zeros(N_COARSE, jnp.int32).at[_bits(values) >> 16].add(1)


def fine(values: Float[Array, "..."], bins: Int[Array, " L"]) -> Int[Array, "L N"]:
    """Counts by their lower bits the values of each bin, all bins different, -1 = none."""
    bits = _bits(values)
    upper, lower = bits >> 16, bits & (N_FINE - 1)
    place = jnp.full(bits.shape, -1)
    for i in range(bins.shape[0]):
        place = jnp.where(upper == bins[i], i * N_FINE + lower, place)
    place = jnp.where(place < 0, bins.shape[0] * N_FINE, place)  # out of bounds: not counted
    return jnp.zeros(bins.shape[0] * N_FINE, jnp.int32).at[place].add(1, mode="drop").reshape(-1, N_FINE)


def bin_of(counts: Int[np.ndarray, " N"], share: float) -> tuple[int, int]:
    """Returns the bin in which the value lies that `share` of all are below, and its rank in there.

    Raises:
        ValueError: where nothing was counted.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    if not ends[-1]:
        raise ValueError("a quantile is of at least one value, got none")
    rank = min(int(share * ends[-1]), int(ends[-1]) - 1)
    i = int(np.searchsorted(ends, rank, side="right"))
    return i, rank - (int(ends[i - 1]) if i else 0)


def value_of(bin_and_rank: Sequence[int], counts: Int[np.ndarray, " N"]) -> np.float32:
    """Returns the value of a rank in a bin, given the counts of the bin's lower bits."""
    upper, rank = bin_and_rank
    lower = int(np.searchsorted(np.cumsum(counts, dtype=np.int64), rank, side="right"))
    return np.uint32(upper << 16 | lower).view(np.float32)


def _bits(values: Array) -> Array:
    return jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32).reshape(-1)
