"""Decode attention in Pallas Mosaic: one pass over blocks of the packed axis, head after head.

A static list of (head, block) pairs is the sequential axis of the grid; blocks lie on multiples of
their size, so one that two heads share is visited twice and read once. The state of the online
softmax, in base 2, stays in VMEM from a head's first block to its last.

XLA keeps an array whose last axis fills no 128 lanes with the axis before it along the lanes. Such
an operand is handed over turned, [B D R] for [B R D]: no copy then, and no padding.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.attention import AttentionForm, Codes, read_length, starts
from pallas_kernels.backend import pl, pltpu, tpu_call

__all__ = ["Settings", "run", "vmem_bytes"]

_LANES = 128
_LOWEST = -1e30  # below every logit, and finite: differences of two stay numbers
_LOG2E = 1.4426950408889634
_VMEM = 16 * 2**20  # what v4, v5e and v5p give a kernel by default; later ones give more
_NOWHERE = 2**30  # a row beyond every array


@dataclass(frozen=True)
class Settings:
    """block: slots per step, at most; the kernel takes fewer where VMEM has no room or rows end."""

    block: int


def run(q, k, v, mass, length, pos, *, form: AttentionForm):
    """Returns what `reference.run` returns.

    The chips have no float16: such rows are first converted to float32, one more pass over them.
    XLA adds a pass too where it lays rows out in another order than the kernel reads them: with D a
    multiple of 128, B above 1 and R no multiple of 8.

    Raises:
        NotImplementedError: for types, head sizes or layouts of codes that the kernel does not take.
    """
    _check(q, k, v, form)
    length = read_length(mass, length, pos, form)
    batch, n_heads, group, size = q.shape
    chosen = tuning.settings(
        "decode_attention",
        _default(k, form.slots),
        dtype=f"int{k.bits}" if isinstance(k, Codes) else str(k.dtype),
        head_dim=size,
        group=group,
        rows=batch * sum(form.slots),
    )
    dtype, (q, k, v) = q.dtype, jax.tree.map(_readable, (q, k, v))
    block = _fit(chosen.block, q, k, v, form)
    shares = 2 if batch % 2 and n_heads > 1 else 1  # an even first axis, for chips with two cores
    items = _items(form.slots, block, shares)

    def head(width):
        def at(n, i, items_ref, _):
            return jax.lax.div(n, shares), _item(items_ref, n, i)[0], 0, 0

        return pl.BlockSpec((1, 1, group, width), at)

    out, lse = tpu_call(
        functools.partial(_kernel, form=form),
        jnp.asarray(items), length.astype(jnp.int32),
        q, *jax.tree.map(_turn, (k, v)), _turn(mass.astype(jnp.float32)[..., None]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch * shares, items.shape[2]),
            in_specs=[head(size), *(_blocks(x, block, shares) for x in (k, v, mass))],
            out_specs=[head(size), head(1)],
            scratch_shapes=[pltpu.VMEM((group, n), jnp.float32) for n in (1, 1, size)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32),
        ],
        semantics=("parallel", "arbitrary"),
        vmem_bytes=vmem_bytes(block, q, k, v),
        name="decode_attention",
    )  # fmt: skip
    out = out.astype(dtype)
    return (out, lse[..., 0]) if form.lse else out


def _default(k, slots: tuple[int, ...]) -> Settings:
    """Returns blocks that take longer to read than to start, and are a quarter of a head at most."""
    quarter = sum(slots) // len(slots) // 4
    return Settings(min(8192 if isinstance(k, Codes) else 4096, max(2048, 2 ** quarter.bit_length() // 2)))


def _check(q, k, v, form: AttentionForm) -> None:
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes float32, bfloat16 and float16, got {q.dtype=}")
    for name, store in (("k", k), ("v", v)):
        if not isinstance(store, Codes) and store.dtype != q.dtype:
            raise NotImplementedError(f"{name} has the type of q, got {store.dtype} for {q.dtype}")
        step = 16 if isinstance(store, Codes) and store.bits == 4 else 8
        if q.shape[-1] % step:
            raise NotImplementedError(
                f"the kernel takes head sizes in multiples of {step}, got D={q.shape[-1]}: pad q, k and v"
            )
    if isinstance(v, Codes) and v.block is not None:
        raise NotImplementedError(
            f"the kernel takes values with one scale per row, got {v.block=}: quantise them with block=None"
        )
    if isinstance(k, Codes) and k.block is not None:
        if k.block not in (16, 32, 64, 128):
            raise NotImplementedError(
                f"the kernel takes codes in blocks of 16 to 128, a power of 2, got {k.block=}"
            )
        if any(size % k.block for size in form.slots[:-1]):
            raise NotImplementedError(
                f"a head's codes start where a block does, got {form.slots=} for {k.block=}: "
                f"make capacities multiples of the block"
            )


def vmem_bytes(block: int, q, k, v) -> int:
    """Returns the bytes of VMEM that the kernel may use with blocks of that many slots.

    Blocks of k, v and mass are held twice, one at work and one on its way. The rest is room for
    the values, turned and masked, for logits and weights, and to order the channels of 4-bit codes.

    Args:
        q, k, v: the kernel's inputs or their shapes, in the types the chips have.
    """
    group, size = q.shape[2:]
    total = 2 * _tiled(size, block, q.dtype.itemsize) + 8 * _tiled(group, block, 4) + 2**18
    for store in (k, v):
        for x, n in _parts(store, block):
            sides = (x.shape[-1], n) if _turned(x.shape[-1]) else (n, x.shape[-1])
            total += 2 * _tiled(*sides, x.dtype.itemsize)
        if isinstance(store, Codes) and store.bits == 4:
            total += 4 * _tiled(size, size, 4)
    return total


def _tiled(rows: int, lanes: int, n_bytes: int) -> int:
    """Returns the bytes of an array in VMEM, whose tiles are 128 lanes of 32 bytes."""
    step = 32 // n_bytes
    return -(-rows // step) * step * -(-lanes // _LANES) * _LANES * n_bytes


def _fit(wanted: int, q, k, v, form: AttentionForm) -> int:
    """Returns the slots per step: a multiple of what tiles and blocks of codes ask."""
    unit = _LANES
    if isinstance(k, Codes) and k.block is not None:  # its scales fill tiles, too
        unit = max(unit, k.block * (_LANES if _turned(q.shape[-1]) else 16))
    most = -(-sum(form.slots) // unit) * unit
    block = max(unit, min(wanted, most) // unit * unit)
    while block > unit and vmem_bytes(block, q, k, v) > _VMEM:
        block = max(unit, block // 2 // unit * unit)
    if (need := vmem_bytes(block, q, k, v)) > _VMEM:
        raise NotImplementedError(
            f"the kernel has {_VMEM} bytes of VMEM, and {block} slots need {need}, got {q.shape=}: "
            f"use impl='reference'"
        )
    return block


def _items(slots: tuple[int, ...], block: int, shares: int) -> np.ndarray:
    """Returns the work [4 shares I]: head, block, the head's first row, its capacity.

    Heads are dealt to the shares in order; the shorter list is filled with work on no slot.
    """
    first, n_heads = starts(slots).tolist(), len(slots)
    work = [
        [(head, at, row, size) for at in range(row // block, (row + size - 1) // block + 1)]
        for head, (row, size) in enumerate(zip(first, slots, strict=False))
    ]
    parts = [slice(n_heads)]
    if shares == 2:  # at the head that parts the work best
        counts = [len(x) for x in work]
        cut = min(range(1, n_heads), key=lambda at: max(sum(counts[:at]), sum(counts[at:])))
        parts = [slice(cut), slice(cut, n_heads)]
    lists = [[item for head in work[part] for item in head] for part in parts]
    most = max(len(x) for x in lists)
    lists = [x + [(*x[-1][:2], _NOWHERE, 0)] * (most - len(x)) for x in lists]
    return np.array(lists, np.int32).transpose(2, 0, 1)


def _item(items_ref, n, i):
    """Returns head, block, first row and capacity of a program's item."""
    share = jax.lax.rem(n, items_ref.shape[1])
    return [items_ref[field, share, i] for field in range(4)]


def _turned(width: int) -> bool:
    """Returns whether slots lie along the lanes in an array of that width."""
    return width % _LANES != 0


def _turn(x):
    return x.swapaxes(1, 2) if _turned(x.shape[-1]) else x


def _readable(x):
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _parts(store, block: int):
    """Returns the arrays of a store, each with its rows in a block."""
    if not isinstance(store, Codes):
        return [(store, block)]
    n = block if store.block is None else block // store.block
    return [(store.codes, block), (store.scale, n), (store.zero, n)]


def _blocks(store, block: int, shares: int):
    """Returns the BlockSpecs of a store, or of the masses."""

    def spec(width, n):
        def at(program, i, items_ref, length_ref):
            batch = jax.lax.div(program, shares)
            head, at, row, most = _item(items_ref, program, i)
            # Past the head's last live block: that one again, which is no new read.
            last = row + jnp.maximum(jnp.minimum(length_ref[batch, head], most), 1) - 1
            place = jnp.minimum(at, jax.lax.div(last, block))
            return (batch, 0, place) if _turned(width) else (batch, place, 0)

        return pl.BlockSpec((1, width, n) if _turned(width) else (1, n, width), at)

    if isinstance(store, Codes):
        codes, scale, zero = (spec(x.shape[-1], n) for x, n in _parts(store, block))
        return Codes(codes, scale, zero, store.bits, store.block)
    return spec(store.shape[-1] if store.ndim == 3 else 1, block)


def _dot(a, b, a_axis: int, b_axis: int):
    """Returns the product over an axis of each, in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _codes(store: Codes, turned: bool, dtype):
    """Loads codes less half their range, [P D] or [D P]; with 4 bits even channels come first."""
    words = pltpu.bitcast(store.codes[0], jnp.int32)  # four bytes at once
    sign = jnp.int32(-0x7F7F7F80)  # 0x80 in each byte
    if store.bits == 8:
        parts = [words ^ sign]
    else:  # 0 to 15, plus 120, less 128: no byte carries into the next
        parts = [(((words >> shift) & 0x0F0F0F0F) + 0x78787878) ^ sign for shift in (0, 4)]
    parts = [pltpu.bitcast(part, jnp.int8) for part in parts]
    return jnp.concatenate(parts, axis=0 if turned else 1).astype(dtype)


def _scales(store: Codes):
    """Loads scales, and zeros for codes less half their range: [1 P] per row, else as stored."""
    scale, zero = (ref[0].astype(jnp.float32) for ref in (store.scale, store.zero))
    return scale, zero + scale * 2 ** (store.bits - 1)


def _evens_first(size: int):
    """Returns the matrix [D D] that moves even channels before odd ones: x @ matrix."""
    channel, at = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    half = size // 2
    return (channel == jnp.where(at < half, 2 * at, 2 * (at - half) + 1)).astype(jnp.float32)


def _logits(q, store):
    """Returns q·k [G P]."""
    size, dtype = q.shape[1], q.dtype
    if not isinstance(store, Codes):
        return _dot(q, store[0], 1, 0 if _turned(size) else 1)
    turned = _turned(size * store.bits // 8)
    codes, (scale, zero) = _codes(store, turned, dtype), _scales(store)
    q = moved = q.astype(jnp.float32)
    if store.bits == 4:
        moved = _dot(q, _evens_first(size), 1, 0)
    if store.block is None:
        logit = _dot(moved.astype(dtype), codes, 1, 0 if turned else 1)
        return logit * scale + jnp.sum(q, axis=1, keepdims=True) * zero
    if _turned(size):
        scale, zero = scale.T, zero.T
    rest = _dot(q, zero, 1, 1)  # [G N]
    if store.bits == 4:
        scale = _dot(scale, _evens_first(size), 1, 0)
    # Scales go into the queries, not the codes: 128 slots, the width of a product, meet the
    # queries of all their blocks, and each slot picks its block's.
    group, per = q.shape[0], _LANES // store.block
    part = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1), store.block)
    out = []
    for n in range(0, scale.shape[0], per):
        at = slice(n * store.block, n * store.block + _LANES)
        scaled = jnp.concatenate([moved * scale[n + j][None] for j in range(per)], axis=0).astype(dtype)
        product = _dot(scaled, codes[:, at] if turned else codes[at], 1, 0 if turned else 1)
        logit = jnp.zeros((group, _LANES), jnp.float32)
        for j in range(per):
            own = product[j * group : (j + 1) * group] + rest[:, n + j : n + j + 1]
            logit = jnp.where(part == j, own, logit)
        out.append(logit)
    return jnp.concatenate(out, axis=1)


def _values(p, alive, store, size: int, dtype):
    """Returns Σ p·v [G D] over the slots alive; with 4 bits even channels come first."""
    if not isinstance(store, Codes):
        v = store[0] if _turned(size) else store[0].T
        return _dot(p.astype(dtype), jnp.where(alive, v, 0), 1, 1)  # a dead slot may hold NaN
    turned = _turned(size * store.bits // 8)
    scale, zero = (jnp.where(alive, x, 0) for x in _scales(store))
    out = _dot((p * scale).astype(dtype), _codes(store, turned, dtype), 1, 1 if turned else 0)
    return out + jnp.sum(p * zero, axis=1, keepdims=True)


def _kernel(
    items_ref,  # [4 shares I] head, block, the head's first row, its capacity
    length_ref,  # [B K]
    q_ref,  # [1 1 G D]
    k_ref,  # [1 P D], turned [1 D P], or codes
    v_ref,  # as k_ref
    mass_ref,  # [1 1 P]
    out_ref,  # [1 1 G D]
    lse_ref,  # [1 1 G 1]
    top_ref,  # [G 1] scratch: the largest logit so far, base 2
    total_ref,  # [G 1] scratch: the sum of weights so far
    sum_ref,  # [G D] scratch: the sum of weighted values so far
    *,
    form: AttentionForm,
):
    """Attends over one block of one head's slots."""
    program, size, block = pl.program_id(0), q_ref.shape[-1], mass_ref.shape[-1]
    head, at, row, most = _item(items_ref, program, pl.program_id(1))
    length = length_ref[jax.lax.div(program, items_ref.shape[1]), head]
    stop, here = row + jnp.clip(length, 0, most), at * block

    @pl.when(here <= row)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, _LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    @pl.when((row < stop) & (here < stop))
    def _():
        slot = here + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        mass = mass_ref[0]
        alive = (slot >= row) & (slot < stop) & (mass > 0)  # what lies beyond the array is undefined
        logit = _logits(q_ref[0, 0], k_ref) * form.factor(size)
        if form.softcap is not None:
            logit = form.softcap * jnp.tanh(logit / form.softcap)
        logit = logit * _LOG2E + jnp.log2(jnp.where(alive, mass, 1.0))
        logit = jnp.where(alive, logit, _LOWEST)
        top = jnp.maximum(top_ref[...], jnp.max(logit, axis=1, keepdims=True))
        p = jnp.where(alive, jnp.exp2(logit - top), 0.0)
        old = jnp.exp2(top_ref[...] - top)
        total_ref[...] = total_ref[...] * old + jnp.sum(p, axis=1, keepdims=True)
        sum_ref[...] = sum_ref[...] * old + _values(p, alive, v_ref, size, q_ref.dtype)
        top_ref[...] = top

    @pl.when(here + block >= row + most)
    def _():
        total, out = total_ref[...], sum_ref[...]
        if isinstance(v_ref, Codes) and v_ref.bits == 4:
            out = _dot(out, _evens_first(size), 1, 1)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        out_ref[0, 0] = jnp.where(some, out / total, 0.0).astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(some, (top_ref[...] + jnp.log2(total)) / _LOG2E, -jnp.inf)
