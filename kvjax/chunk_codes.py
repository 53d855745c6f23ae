"""Stores the rows of a chunk in 4 bits: codes of two channels a byte, a scale and a least value for each row.

A channel differs by at most half its row's scale from what it was, and by rounding to its type.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["bytes4", "decode4", "encode4"]


def encode4(rows: Float[np.ndarray, "P 2 D"]) -> bytes:
    """Returns rows in 4 bits."""
    x = rows.astype(np.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = np.maximum(high - low, 1e-8) / 15
    codes = np.clip(np.rint((x - low) / scale), 0, 15).astype(np.uint8)
    return (codes[..., ::2] | codes[..., 1::2] << 4).tobytes() + scale.tobytes() + low.tobytes()


def decode4(stored: memoryview, shape: tuple[int, ...], dtype: Any) -> Float[np.ndarray, "P 2 D"]:
    """Returns the rows that `encode4` was given, nearly."""
    n = int(np.prod(shape)) // 2
    both = np.frombuffer(stored[:n], np.uint8).reshape(*shape[:-1], -1)
    codes = np.stack([both & 15, both >> 4], -1).reshape(shape)
    scale, low = np.frombuffer(stored[n:], np.float32).reshape(2, *shape[:-1], 1)
    return (codes * scale + low).astype(dtype)


def bytes4(shape: tuple[int, ...]) -> int:
    """Returns the bytes of rows [P 2 D] in 4 bits.

    Example:
        >>> bytes4((64, 2, 128)), 64 * 2 * 128 * 2  # beside bfloat16
        (9216, 32768)
    """
    return int(np.prod(shape)) // 2 + 8 * int(np.prod(shape[:-1]))
