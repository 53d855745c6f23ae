"""The rules that products with sparse activations share for their inputs."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

__all__ = [
    "MAX_BATCH",
    "block_order",
    "check_scale",
    "check_weights",
    "cut",
    "refuse",
    "settings_key",
]

MAX_BATCH = 8


def check_weights(x: Array, active: Array, w: Array, scale: Array | None, n_outputs: int) -> None:
    """Raises where the weights [F M] do not fit the inputs.

    active: [B F], whose zeros say which rows are not read. n_outputs: that of the output's channels.
    """
    if w.shape[0] != active.shape[1]:
        raise ValueError(
            f"weights have a row per sparse channel, {active.shape[1]}, got {w.shape=}: "
            f"they lie as [F M], the sparse axis first"
        )
    check_scale(w, scale, n_outputs)
    if x.dtype != active.dtype:
        raise ValueError(f"inputs are of one type, got {x.dtype} and {active.dtype}: convert one of them")


def check_scale(w: Array, scale: Array | None, n_outputs: int) -> None:
    """Raises where weights are neither floats nor int8, or have no scales as theirs are."""
    if not (jnp.issubdtype(w.dtype, jnp.floating) or w.dtype == jnp.int8):
        raise TypeError(f"weights are floats or int8, got {w.dtype=}")
    if (w.dtype == jnp.int8) != (scale is not None):
        raise ValueError(
            f"int8 weights, and no others, come with scales, got {w.dtype=} and {scale=}: "
            f"give one scale per output channel"
        )
    if scale is not None and scale.shape != (n_outputs,):
        raise ValueError(f"there is one scale per output channel, {(n_outputs,)}, got {scale.shape=}")


def cut(x: Array, level: Array | None) -> Array:
    """Returns x with 0 for what is below a level; NaN stays."""
    return x if level is None else jnp.where(jnp.abs(x.astype(jnp.float32)) < level, 0, x)


def refuse(x: Array, w: Array, types: tuple[str, ...]) -> None:
    """Raises NotImplementedError for a batch or a type that a kernel does not take.

    types: those the back end computes in.
    """
    if x.shape[0] > MAX_BATCH:
        raise NotImplementedError(
            f"the kernel takes batches up to {MAX_BATCH}, got B={x.shape[0]}: use the dense product, "
            f"as the union of so many rows' channels is nearly all of them"
        )
    if x.dtype.name not in types:
        raise NotImplementedError(f"the kernel takes {', '.join(types)}, got {x.dtype=}: convert x")
    if w.dtype not in (x.dtype, jnp.int8):
        raise NotImplementedError(f"weights are int8 or of x's type, got {w.dtype} for {x.dtype}: convert w")


def settings_key(x: Any, w: Any) -> dict[str, int | str]:
    """Returns what the best settings of a GPU kernel for weights [F M] depend on.

    What does not fit a multiprocessor's shared memory differs by words: the types, and which of the op's two
    kernels runs.
    """
    words = {"dtype": w.dtype.name, "inputs": x.dtype.name, "kernel": "batch" if x.shape[0] > 1 else "one"}
    return words | {"batch": x.shape[0], "rows": w.shape[0], "width": w.shape[1]}


def block_order(active: Array, rows: int) -> tuple[Array, Array]:
    """Returns the blocks of rows, those with a non-zero first, [N], and how many those are, [1].

    active: [B F]. The order of each kind is kept, so that memory is read forwards.
    """
    flags = jnp.pad(jnp.any(active != 0, axis=0), (0, -active.shape[1] % rows))
    flags = flags.reshape(-1, rows).any(axis=1)
    order = jnp.argsort(~flags, stable=True).astype(jnp.int32)
    return order, flags.sum(dtype=jnp.int32)[None]
