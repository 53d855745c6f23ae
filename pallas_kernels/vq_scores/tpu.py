"""Scores by codes in Pallas Mosaic: look-ups in 128 lanes at a time.

A TPU gathers within one register row of 128 lanes. So a code is a line of the table (code // 128)
and a lane, every line is gathered from, and the slots of that line keep the result. Rows are the
KV heads of all batch rows, 8 to a register, each with its own table: line by line, [R, 128].
"""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import pl, pltpu, tpu_call
from pallas_kernels.vq_scores.reference import ALWAYS

__all__ = ["run"]

_LANES, _ROWS, _SLOTS = 128, 8, 2048
_VMEM = 48 * 2**20


def run(q, codebook, codes, *, reduce, dtype):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for scores in float16, or tables that do not fit the vector memory.
    """
    if dtype == jnp.float16:
        raise NotImplementedError("the kernel writes float32 and bfloat16, got dtype=float16: use bfloat16")
    batch, n_heads, n_slots = codes.shape
    table = _tables(q, codebook, reduce)
    group, lines, n_rows, _ = table.shape
    rows, slots = min(_ROWS, n_rows), min(_SLOTS, pl.cdiv(n_slots, _LANES) * _LANES)
    table_bytes = group * lines * _ROWS * _LANES * 4
    vmem_bytes = 2 * table_bytes + 2 * _ROWS * slots * (2 + 4 * pl.cdiv(group, 8) * 8) + 2**21
    if vmem_bytes > _VMEM:
        raise NotImplementedError(
            f"the kernel holds the tables of 8 heads in {_VMEM} bytes of vector memory, got {vmem_bytes} "
            f"for G={group} and C={codebook.shape[1]}: use reduce, or fewer codewords"
        )
    out = tpu_call(
        _look_up,
        codes.reshape(n_rows, n_slots), table,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(pl.cdiv(n_rows, rows), pl.cdiv(n_slots, slots)),
            in_specs=[
                pl.BlockSpec((rows, slots), lambda r, s: (r, s)),
                pl.BlockSpec((group, lines, rows, _LANES), lambda r, s: (0, 0, r, 0)),
            ],
            out_specs=pl.BlockSpec((rows, group, slots), lambda r, s: (r, 0, s)),
        ),
        out_shape=jax.ShapeDtypeStruct((n_rows, group, n_slots), dtype),
        semantics=("parallel", "parallel"),
        vmem_bytes=vmem_bytes,
        name="vq_scores",
    )  # fmt: skip
    return out.reshape(batch, n_heads, n_slots) if reduce else out.reshape(batch, n_heads, group, n_slots)


def _tables(q, codebook, reduce):
    """Returns the scores of the codewords, in lines: [G, ceil(C/128), B·K, 128] float32."""
    dtype = jnp.promote_types(q.dtype, codebook.dtype)
    table = jnp.einsum(
        "bkgd,kcd->gbkc", q.astype(dtype), codebook.astype(dtype),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    if reduce:
        table = table.max(0, keepdims=True)
    table = jnp.pad(table, ((0, 0),) * 3 + ((0, -table.shape[3] % _LANES),), constant_values=-jnp.inf)
    group, batch, n_heads, n_codes = table.shape
    return table.reshape(group, batch * n_heads, n_codes // _LANES, _LANES).swapaxes(1, 2)


def _look_up(
    codes_ref,  # [R S]
    table_ref,  # [G, lines, R, 128]
    out_ref,  # [R G S]
):
    """Looks up one block of slots of up to eight heads."""
    group, lines, rows, _ = table_ref.shape
    height = max(2, rows)  # a gather wants two rows

    def visit(i, _):
        at = pl.ds(pl.multiple_of(i * _LANES, _LANES), _LANES)
        code = jnp.broadcast_to(codes_ref[:, at].astype(jnp.int32), (height, _LANES))
        line, lane = code >> 7, code & (_LANES - 1)  # below 0: line -1

        def gather(j, scores):
            here = line == j
            return tuple(
                jnp.where(
                    here,
                    jnp.take_along_axis(
                        jnp.broadcast_to(table_ref[g, j], (height, _LANES)), lane, axis=1,
                        mode="promise_in_bounds",
                    ),
                    score,
                )
                for g, score in enumerate(scores)
            )  # fmt: skip

        empty = tuple(jnp.full((height, _LANES), -jnp.inf, jnp.float32) for _ in range(group))
        scores = jax.lax.fori_loop(0, lines, gather, empty, unroll=min(8, lines))
        for g, score in enumerate(scores):
            score = jnp.where(code == ALWAYS, jnp.inf, score)
            out_ref[:, g, at] = score[:rows].astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, codes_ref.shape[1] // _LANES, visit, 0)
