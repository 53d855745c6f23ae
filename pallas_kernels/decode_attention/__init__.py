"""Attention of one query token per head over weighted slots, packed head after head."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionForm, check_attention
from pallas_kernels.decode_attention import gpu, reference, tpu

__all__ = ["decode_attention"]


def decode_attention(
    q: Float[Array, "B K G D"],
    k: Any,
    v: Any,
    mass: Float[Array, "B R"],
    length: Int[Array, "B K"] | None = None,
    pos: Int[Array, " B"] | None = None,
    *,
    form: AttentionForm,
    impl: str | None = None,
) -> Float[Array, "B K G D"] | tuple[Float[Array, "B K G D"], Float[Array, "B K G"]]:
    """Returns Σ_s softmax_s(scale·q·k_s + log mass_s) v_s over the slots of each KV head.

    A slot of mass 0 does not count, whatever it holds, and a head without any gives 0 (and a
    log-sum-exp of -inf). Slots at or beyond `length` are not read.

    Args:
        q: rotated queries, float32, bfloat16 or float16.
        k, v: rows [B R D] of q's type, or `Codes` of them, which a GPU decodes to float16 (beyond
            65,504 they overflow) unless q is float32. R = Σ form.slots.
        mass: tokens that each slot stands for.
        length: slots of each head that may count; None for all. With form.holes see `AttentionForm`.
        pos: of each row's query; a negative one is padding, and reads nothing. None for no padding.
        form: capacities of the heads, scale, soft cap, and whether to return the log-sum-exp.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree; in debug mode a mass that is negative or NaN.
        NotImplementedError: for a type or head size without a kernel, where impl names one.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1, split over slots as in Flash-Decoding.

    Cost: reads 2·B·ΣS·D elements and B·ΣS masses; 4·B·G·ΣS·D FLOPs.

    Example:
        >>> import jax
        >>> q, k, v = (
        ...     jax.random.normal(key, shape)
        ...     for key, shape in zip(
        ...         jax.random.split(jax.random.key(0), 3), [(1, 2, 4, 64), (1, 96, 64), (1, 96, 64)]
        ...     )
        ... )
        >>> mass = jnp.ones((1, 96)).at[:, 90:].set(0)
        >>> decode_attention(q, k, v, mass, form=AttentionForm(slots=(32, 64))).shape
        (1, 2, 4, 64)
    """
    check_attention(q, k, v, mass, form)
    if length is None:
        length = jnp.broadcast_to(jnp.asarray(form.slots, jnp.int32), q.shape[:2])
    if length.shape != q.shape[:2] or (pos is not None and pos.shape != q.shape[:1]):
        raise ValueError(
            f"there is one length per row and KV head, and one position per row, got {length.shape=} and "
            f"{None if pos is None else pos.shape} for {q.shape=}"
        )
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    return dispatch.run("decode_attention", impl, impls, q, k, v, mass, length, pos, form=form)
