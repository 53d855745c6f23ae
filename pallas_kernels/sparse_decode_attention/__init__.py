"""Attention of one query token per head over the slots that an index list names."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionForm, check_attention
from pallas_kernels.backend import debug_check
from pallas_kernels.host import on_host
from pallas_kernels.sparse_decode_attention import gpu, reference, tpu

__all__ = ["sparse_decode_attention"]


def sparse_decode_attention(
    q: Float[Array, "B K G D"],
    k: Any,
    v: Any,
    mass: Float[Array, "B R"],
    idx: Int[Array, "B K N"],
    *,
    form: AttentionForm,
    block: int,
    impl: str | None = None,
) -> Float[Array, "B K G D"] | tuple[Float[Array, "B K G D"], Float[Array, "B K G"]]:
    """Returns Σ_s softmax_s(scale·q·k_s + log mass_s) v_s over the slots of each head's chosen blocks.

    Block i of a head is its slots i·P to i·P+P-1; those beyond the head's capacity do not count, nor
    does a slot of mass 0, whatever it holds. A head without any gives 0 (and a log-sum-exp of -inf).

    k and v may lie in pinned host memory: `jax.device_put(k, jax.memory.Space.Host)`, or a sharding
    with memory_kind="pinned_host". The GPU kernel reads the chosen rows there, and moves no others,
    if k and v reach this function as they were placed: any operation on them in between, a reshape
    too, makes XLA move the whole. The reference moves the chosen blocks one by one. q, mass and idx
    lie on the device.

    Args:
        q: rotated queries, float32, bfloat16 or float16.
        k, v: rows [B R D] of q's type, or `Codes` of them, which a GPU decodes to float16 (beyond
            65,504 they overflow) unless q is float32. R = Σ form.slots.
        mass: tokens that each slot stands for.
        idx: blocks that each KV head reads, counted from its first slot; -1 is none, and reads
            nothing. Give each block once: one given twice counts twice. Fastest with none at the end.
        form: capacities of the heads, scale, soft cap, and whether to return the log-sum-exp.
        block: slots per block, P; 1 chooses single slots.
        impl: None, "reference", "gpu" or "tpu", see `dispatch`.

    Raises:
        ValueError: for shapes that disagree, or q, mass or idx in host memory; in debug mode for an
            index of no block, and a mass that is negative or NaN.
        NotImplementedError: for a type, head size or place without a kernel, where impl names one.

    Source: Quest (arXiv 2406.10774), section 3.3, for blocks; A²ATS (arXiv 2502.12665) for single slots.

    Cost: reads 2·B·K·N·P·D elements, B·K·N·P masses and B·K·N indices; 4·B·K·G·N·P·D FLOPs.

    Example:
        >>> q, k = jnp.ones((1, 2, 4, 64)), jnp.ones((1, 96, 64))
        >>> mass, idx = jnp.ones((1, 96)), jnp.asarray([[[1, 0], [3, -1]]])
        >>> form = AttentionForm(slots=(32, 64))
        >>> sparse_decode_attention(q, k, k, mass, idx, form=form, block=16).shape
        (1, 2, 4, 64)
    """
    check_attention(q, k, v, mass, form)
    if block < 1:
        raise ValueError(f"a block has at least one slot, got {block=}")
    if idx.ndim != 3 or idx.shape[:2] != q.shape[:2] or idx.shape[2] < 1:
        raise ValueError(f"idx lists one block or more per row and KV head, got {idx.shape=} for {q.shape=}")
    for name, x in (("q", q), ("mass", mass), ("idx", idx)):
        if on_host(x):
            raise ValueError(f"only k and v may lie in host memory, got {name} there: put it on the device")
    n_blocks = jnp.asarray([-(-size // block) for size in form.slots], jnp.int32)
    debug_check(
        lambda: jnp.all((idx >= -1) & (idx < n_blocks[:, None])),
        "an index is a block of its head, or -1 for none",
    )
    impls = {"reference": reference.run, "gpu": gpu.run, "tpu": tpu.run}
    idx = idx.astype(jnp.int32)
    return dispatch.run("sparse_decode_attention", impl, impls, q, k, v, mass, idx, form=form, block=block)
