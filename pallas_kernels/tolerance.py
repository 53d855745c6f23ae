"""Says how far a kernel may be from its reference: one table by type, one measure of error."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["error", "limit"]

_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def limit(dtype: Any, n: int) -> float:
    """Returns the largest relative error of a row whose elements are sums of n products.

    Operands are rounded once or twice to dtype, sums are in float32 and err with the root of n.
    """
    return 2 * _ROUNDING[jnp.dtype(dtype).name] + 8 * 2.0**-23 * math.sqrt(n)


def error(out: Any, expected: Any) -> float:
    """Returns the largest ‖out − expected‖ / ‖expected‖ over rows (the last axis) of all arrays.

    A NaN or infinity where the reference has none, or a wrong shape, is an infinite error;
    infinities of the reference must be met exactly. A row of zeros must be zero.
    """
    worst = 0.0
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        a, b = (np.atleast_1d(np.asarray(x, np.float64)) for x in (a, b))
        if a.shape != b.shape or not np.array_equal(
            np.where(np.isfinite(a), 0, a), np.where(np.isfinite(b), 0, b)
        ):
            return math.inf
        a, b = (np.where(np.isfinite(x), x, 0.0) for x in (a, b))
        size, gap = np.linalg.norm(b, axis=-1), np.linalg.norm(a - b, axis=-1)
        ratio = np.where(gap == 0, 0.0, gap / np.where(size > 0, size, np.finfo(np.float64).tiny))
        worst = max(worst, float(ratio.max(initial=0.0)))
    return worst
