"""Draws the next token: greedy, or by temperature with top-k, top-p and min-p limits.

The settings are arrays, so changing them compiles nothing.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax.shapes import Leaf

__all__ = ["Sampling", "sample"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a row ends.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a limit off. stop: token ids that
    end a row; None means the model's own in `generate`, and none elsewhere.

    Example:
        >>> import kvjax
        >>> model = kvjax.load("smollm2-135m")
        >>> sampling = kvjax.Sampling(temperature=0.8, top_p=0.9, seed=1)
        >>> one, same = (
        ...     kvjax.generate(model, "The capital of France is", max_new_tokens=2, sampling=sampling)
        ...     for _ in range(2)
        ... )
        >>> one == same
        True
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for settings outside their range."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature is at least 0 (0 = greedy), got {self.temperature=}")
        if self.top_k < 0:
            raise ValueError(f"top_k is at least 0 (0 = all tokens), got {self.top_k=}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is in (0, 1], got {self.top_p=}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is in [0, 1], got {self.min_p=}")

    def limits(self) -> "Limits":
        """Returns the settings as traced values, on the host: a call takes them along for nothing."""
        numbers = (self.temperature, self.top_k, self.top_p, self.min_p)
        return Limits(
            *(np.float32(x) for x in numbers),
            stop=np.asarray(self.stop or (-1,), np.int32),
            seed=np.uint32(self.seed % 2**32),
            greedy=self.temperature == 0,
        )


@struct.dataclass
class Limits:
    """Sampling settings of a compiled program.

    greedy is known when a program is compiled: to choose on the device would halt a GPU in every step.
    """

    temperature: Leaf
    top_k: Leaf
    top_p: Leaf
    min_p: Leaf
    stop: Leaf  # [n] token ids
    seed: Leaf
    greedy: bool = struct.field(pytree_node=False)


def sample(logits: Float[Array, "B V"], limits: Limits, step: Int[Array, ""]) -> Int[Array, " B"]:
    """Returns one token per row; the same seed and step draw the same.

    Limits apply in the order top-k, top-p, min-p to the distribution at the given temperature;
    the likeliest token always stays.
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32) if limits.greedy else _draw(logits, limits, step)


def _draw(logits: Array, limits: Limits, step: Array) -> Array:
    """Samples in order of probability, where every limit is a prefix."""
    scaled = logits.astype(jnp.float32) / jnp.maximum(limits.temperature, 1e-6)
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(ranked.shape[-1])
    ranked = jnp.where((limits.top_k > 0) & (rank >= limits.top_k), -jnp.inf, ranked)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    ranked = jnp.where((before >= limits.top_p) & (rank > 0), -jnp.inf, ranked)
    p = jax.nn.softmax(ranked, axis=-1)
    ranked = jnp.where(p < limits.min_p * p[:, :1], -jnp.inf, ranked)
    drawn = jax.random.categorical(jax.random.fold_in(jax.random.key(limits.seed), step), ranked, axis=-1)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
