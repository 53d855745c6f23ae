"""Top-k selection in Pallas Mosaic: bisect rows held in VMEM, then compact by one-hot products.

A program holds a few rows, or the query heads of one group, as [R T 128] integer keys in float32's
total order, where -0.0 is below 0.0. It bisects the k-th key of all its rows at once, and among
equals the last index. TPUs scatter badly, so output j looks for its score instead: with the counts
of chosen scores before each line of 128, a one-hot row finds j's line, a product fetches that line,
a triangular product numbers its scores, and the number j has in it gives the lane.

Bisecting takes up to 32 passes over VMEM (fewer where a threshold separates exactly k), and up to
log2 S more where equals are cut; the compaction of a row S·k/128 compares and S·k multiplications.
XLA lays the scores out anew before the kernel: one more read and write of them.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import pl, pltpu, tpu_call

__all__ = ["run", "select"]

_LOWEST = -0x7F800001  # the key of -inf, which is never chosen
_TOP = 0x7FFFFFFF
_LANES = 128
_ROWS_BYTES = 2 * 2**20  # of keys that a program of single rows holds
_MOST_BYTES = 16 * 2**20  # of keys that a program can hold


def run(scores, *, k: int):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for types that the kernel does not take, and rows beyond VMEM.
    """
    rows = scores.reshape(-1, scores.shape[-1])
    fits = [
        n for n in (8, 4, 2, 1) if len(rows) % n == 0 and (n == 1 or n * rows.shape[1] * 4 <= _ROWS_BYTES)
    ]
    return select(rows.reshape(-1, fits[0], rows.shape[1]), k, None).reshape(*scores.shape[:-1], k)


def select(scores, k: int, limit: int | None):
    """Returns, for rows in groups [I R S], the indices [I R k] of the k largest, or of unions [I 1 limit]."""
    if scores.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {scores.dtype=}")
    if scores.dtype == jnp.float16:  # which Mosaic has not
        scores = scores.astype(jnp.float32)
    n, n_rows, size = scores.shape
    lines = -(-size // _LANES)
    step = min(32, -(-lines // 16) * 16)
    lines = -(-lines // step) * step
    span = min(512, -(-lines // _LANES) * _LANES)
    n_lines = -(-lines // span) * span  # as the compaction pads them
    if (held := n_rows * lines * _LANES * 4) > _MOST_BYTES:
        raise NotImplementedError(
            f"the kernel holds up to {_MOST_BYTES} bytes of rows in VMEM, got {held} for {n_rows} rows of "
            f"{size}: use impl='reference'"
        )
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, lines * _LANES - size)), constant_values=-jnp.inf)
    n_out, wanted = (n_rows, k) if limit is None else (1, limit)
    out_lines = -(-wanted // _LANES)
    out = tpu_call(
        functools.partial(_select, k=k, limit=limit, step=step, span=span),
        scores.reshape(n, n_rows, lines, _LANES),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(n,),
            in_specs=[pl.BlockSpec((None, n_rows, lines, _LANES), lambda i: (i, 0, 0, 0))],
            out_specs=pl.BlockSpec((None, n_out, out_lines, _LANES), lambda i: (i, 0, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((n_rows, lines, _LANES), jnp.int32),
                pltpu.VMEM((n_lines, _LANES), jnp.bfloat16),
                pltpu.VMEM((8, n_lines), jnp.float32),
                pltpu.VMEM((8, n_lines), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((n, n_out, out_lines, _LANES), jnp.int32),
        semantics=("parallel",),
        vmem_bytes=3 * held + 8 * n_out * out_lines * _LANES + n_lines * 512 + 8 * 2**20,
        name="select_topk" if limit is None else "union_topk",
    )
    return out.reshape(n, n_out, -1)[..., :wanted]


def _bisect(count, low, high, n, k: int):
    """Returns per row the largest t with count(t) >= k, or an earlier one with k exactly, and its count.

    low, high, n: [R 1 1], with count(low) = n, which is left where n <= k already, and count(high) < k.
    """

    def open_rows(low, high, n):
        return (high > low + 1) & (n > k)

    def body(carry):
        low, high, n = carry
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # low + high would overflow
        n_middle = count(middle)
        going, enough = open_rows(*carry), n_middle >= k
        return (
            jnp.where(going & enough, middle, low),
            jnp.where(going & jnp.logical_not(enough), middle, high),
            jnp.where(going & enough, n_middle, n),
        )

    low, _, n = jax.lax.while_loop(
        lambda carry: jnp.sum(jnp.where(open_rows(*carry), 1.0, 0.0)) > 0, body, (low, high, n)
    )
    return low, n


def _chunk(key_ref, n_rows: int, step: int, i):
    """Returns a step's keys [R step 128] and their indices [1 step 128]."""
    shape = (1, step, _LANES)
    line, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    return key_ref[:n_rows, pl.ds(pl.multiple_of(i * step, step), step)], (i * step + line) * _LANES + lane


def _bound(key_ref, n_rows: int, step: int, k: int):
    """Returns per row [R 1 1] key and index such that the k largest are above, or equal and up to it."""
    lines = key_ref.shape[1]

    def total(inside):
        def body(i, n):
            hit = jnp.where(inside(*_chunk(key_ref, n_rows, step, i)), 1.0, 0.0)
            return n + jnp.sum(hit.reshape(n_rows, step // 8, 8, _LANES), axis=1)

        n = jax.lax.fori_loop(0, lines // step, body, jnp.zeros((n_rows, 8, _LANES), jnp.float32))
        return jnp.sum(jnp.sum(n, axis=2, keepdims=True), axis=1, keepdims=True)

    full = lambda value: jnp.full((n_rows, 1, 1), value, jnp.int32)  # noqa: E731
    low = full(_LOWEST + 1)
    above = lambda t: total(lambda key, at: key >= t)  # noqa: E731
    low, n = _bisect(above, low, full(_TOP), above(low), k)
    # Of equals the first are taken, up to which index is bisected too: negated, as counts rise with it.
    ahead = lambda t: total(lambda key, at: (key > low) | ((key == low) & (at <= -t)))  # noqa: E731
    last, _ = _bisect(ahead, full(-lines * _LANES), full(1), n, k)
    return low, -last


def _select(
    scores_ref,  # [R T 128]
    out_ref,  # [R ceil(k/128) 128], or [1 ceil(limit/128) 128]
    key_ref,  # [R T 128] keys, then 1 for what is chosen
    mask_ref,  # [T2 128] what is chosen of one row
    before_ref,  # [8 T2] chosen before each line, the same 8 times
    after_ref,  # [8 T2] chosen up to the end of each line
    *,
    k: int,
    limit: int | None,
    step: int,
    span: int,
):
    """Bisects the rows of one program and writes the indices of what they choose, or of its union."""
    n_rows, lines, _ = scores_ref.shape
    n_out = out_ref.shape[0]
    each = functools.partial(jax.lax.fori_loop, 0, lines // step)

    def convert(i, _):
        rows = pl.ds(pl.multiple_of(i * step, step), step)
        bits = pltpu.bitcast(scores_ref[:, rows].astype(jnp.float32), jnp.int32)
        key_ref[:, rows] = jnp.where(bits < 0, bits ^ _TOP, jnp.minimum(bits, _TOP - 1))
        return _

    each(convert, 0)
    low, last = _bound(key_ref, n_rows, step, k)
    if limit is not None:

        def unite(i, _):
            key, at = _chunk(key_ref, n_rows, step, i)
            inside = jnp.where((key > low) | ((key == low) & (at <= last)), 1, 0)
            most = jnp.where(jnp.max(inside, axis=0) > 0, jnp.max(key, axis=0), _LOWEST)
            key_ref[0, pl.ds(pl.multiple_of(i * step, step), step)] = most
            return _

        each(unite, 0)
        low, last = _bound(key_ref, 1, step, limit)

    def mark(i, _):
        key, at = _chunk(key_ref, n_out, step, i)
        inside = (key > low) | ((key == low) & (at <= last))
        key_ref[:n_out, pl.ds(pl.multiple_of(i * step, step), step)] = jnp.where(inside, 1, 0)
        return _

    each(mark, 0)
    mask_ref[...] = jnp.zeros_like(mask_ref)

    def compact(row, _):
        def copy(i, _):
            at = pl.ds(pl.multiple_of(i * step, step), step)
            mask_ref[at] = key_ref[row, at].astype(jnp.float32).astype(jnp.bfloat16)
            return _

        each(copy, 0)
        _count(mask_ref, before_ref, after_ref)

        def write(i, _):
            out_ref[row, pl.ds(i, 1)] = _places(i, mask_ref, before_ref, after_ref, span)
            return _

        return jax.lax.fori_loop(0, out_ref.shape[1], write, _)

    jax.lax.fori_loop(0, n_out, compact, 0)


def _count(mask_ref, before_ref, after_ref) -> None:
    """Counts what is chosen before and up to the end of each line."""
    n_lines = mask_ref.shape[0]
    ones = jnp.ones((8, _LANES), jnp.bfloat16)
    n = jax.lax.dot_general(ones, mask_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    lane = jax.lax.broadcasted_iota(jnp.int32, n.shape, 1)
    after, shift = n, 1
    while shift < n_lines:  # a prefix sum in log2 steps
        after = after + jnp.where(lane >= shift, pltpu.roll(after, shift, 1), 0.0)
        shift *= 2
    after_ref[...] = after
    before_ref[...] = after - n


def _places(i, mask_ref, before_ref, after_ref, span: int):
    """Returns the indices [1 128] of the chosen scores number 128 i and on, -1 where there are no more."""
    shape = (_LANES, _LANES)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    number = (i * _LANES + row[:, :1]).astype(jnp.float32)  # [128 1]

    def body(j, carry):
        line, rank, place = carry
        at = pl.ds(pl.multiple_of(j * span, span), span)
        before, after = before_ref[:1, at], after_ref[:1, at]
        here = (before <= number) & (number < after)  # [128 span] one line at most
        lines = (j * span + jax.lax.broadcasted_iota(jnp.int32, (1, span), 1)).astype(jnp.float32)
        hot = jnp.where(here, 1.0, 0.0).astype(jnp.bfloat16)
        line += jnp.dot(hot, mask_ref[at], preferred_element_type=jnp.float32)
        rank += jnp.sum(jnp.where(here, number - before, 0.0), axis=1, keepdims=True)
        return line, rank, place + jnp.sum(jnp.where(here, lines, 0.0), axis=1, keepdims=True)

    zero = jnp.zeros((_LANES, 1), jnp.float32)
    n_spans = mask_ref.shape[0] // span
    line, rank, place = jax.lax.fori_loop(0, n_spans, body, (jnp.zeros(shape, jnp.float32), zero, zero))
    upto = jnp.where(row <= column, 1.0, 0.0).astype(jnp.bfloat16)
    numbers = jnp.dot(line.astype(jnp.bfloat16), upto, preferred_element_type=jnp.float32)
    lane = jnp.sum(jnp.where(numbers <= rank, 1.0, 0.0), axis=1, keepdims=True)
    total = jnp.max(after_ref[:1], axis=1, keepdims=True)  # [1 1]
    idx = jnp.where(number < total, place * _LANES + lane, -1.0)
    # From sublanes to lanes, by the diagonal.
    return jnp.sum(jnp.where(row == column, idx, 0.0), axis=0, keepdims=True).astype(jnp.int32)
