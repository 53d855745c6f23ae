"""Rotates queries and keys by their positions (rotary position embedding).

Source: RoFormer (arXiv 2104.09864) with the half-split pairing of Hugging Face checkpoints:
dimension i turns with dimension i + D/2. Frequency scaling: Llama 3.1's piecewise rule and
YaRN (arXiv 2309.00071, equations 17 to 25), both as released with the checkpoints.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pallas_kernels
from kvjax.models.config import RopeConfig
from pallas_kernels.rotate_rows.reference import rotated

__all__ = ["angles", "frequencies", "rotate", "rotate_rows"]


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns the D/2 angular frequencies (radians per token, float64) and the factor on cos and sin.

    Raises:
        ValueError: for a scaling rule that is not known.
    """
    inv = rope.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling == "none":
        return inv, 1.0
    if rope.scaling == "linear":
        return inv / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, inv), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope, inv, head_dim)
    raise ValueError(f"RoPE scaling is none, linear, llama3 or yarn, got {rope.scaling=}")


def _llama3(rope: RopeConfig, inv: np.ndarray) -> np.ndarray:
    """Divides slow frequencies by the factor, keeps fast ones, and blends those between."""
    turns = rope.original_context * inv / (2 * math.pi)  # full turns inside the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * inv / rope.factor + blend * inv


def _yarn(rope: RopeConfig, inv: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """Interpolates dimensions that turn seldom and extrapolates those that turn often."""

    def dim_of(turns: float) -> float:
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(math.floor(dim_of(rope.beta_fast)), 0)
    high = min(math.ceil(dim_of(rope.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    factor = rope.attention_factor
    if factor is None:
        factor = 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
    return inv / rope.factor * ramp + inv * (1 - ramp), factor


def angles(
    pos: Int[Array, "*rows"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "*rows E"], Float[Array, "*rows E"]]:
    """Returns cosines and sines of the E = D/2 angles of positions, in float32, with the rule's factor."""
    inv, factor = frequencies(rope, head_dim)
    angle = pos[..., None].astype(jnp.float32) * jnp.asarray(inv, jnp.float32)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: Float[Array, "*rows D"], pos: Int[Array, "*rows"], rope: RopeConfig) -> Float[Array, "*rows D"]:
    """Rotates each vector of x to its position; angles in float32, the result in x's dtype."""
    return rotated(x.astype(jnp.float32), *angles(pos, rope, x.shape[-1])).astype(x.dtype)


def rotate_rows(
    x: Float[Array, "B R D"], pos: Int[Array, "B R"], rope: RopeConfig, *, back: bool = False
) -> Float[Array, "B R D"]:
    """Does as `rotate` for the rows of a whole state, or undoes it up to rounding, and stores no angles."""
    inv, factor = frequencies(rope, x.shape[-1])
    return pallas_kernels.rotate_rows(x, pos, jnp.asarray(inv, jnp.float32), factor=factor, back=back)
