"""Bounds of blocks in Pallas Mosaic.

Where every head holds whole blocks, the packed rows are blocks one after the other, and a step of
the grid takes any T of them. Masses lie along lanes and slots along sublanes, so a transpose
brings the masses of 128 slots upright.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.backend import pl, pltpu, tpu_call

__all__ = ["run"]

_STEP_BYTES = 2**20  # of keys, per step of the grid
_LARGEST = 1024  # slots of a block: temporaries grow with it


def run(k, mass, *, slots, block):
    """Returns what `reference.run` returns.

    Raises:
        NotImplementedError: for blocks that are too large.
    """
    if block > _LARGEST:
        raise NotImplementedError(
            f"the kernel takes blocks of up to {_LARGEST} slots, got {block=}: take bounds of smaller "
            f"blocks, then their minimum and maximum"
        )
    dtype, size = k.dtype, k.shape[2]
    if dtype == jnp.float16:
        k = k.astype(jnp.float32)  # Mosaic has no float16
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"the kernel takes float32, bfloat16 and float16, got {k.dtype=}: convert it"
        )
    padded = max(8, pl.next_power_of_2(block))
    if padded != block or any(s % block for s in slots):
        k, mass = (_whole(x, slots, block, padded) for x in (k, mass))
    group = max(1024, 8 * padded)  # rows at once: whole tiles of masses, and of blocks
    step = group * max(1, _STEP_BYTES // (group * k.dtype.itemsize * max(128, size)))
    step = min(step, -(-k.shape[1] // group) * group)
    batch, rows = mass.shape
    mass = jnp.pad(mass, ((0, 0), (0, -rows % step))).reshape(batch, -1, 128)
    bounds = pl.BlockSpec((1, step // padded, size), lambda b, i: (b, i, 0))
    low, high = tpu_call(
        functools.partial(_bound, group=group, block=padded),
        mass, k,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(batch, -(-rows // step)),
            in_specs=[
                pl.BlockSpec((1, step // 128, 128), lambda b, i: (b, i, 0)),
                pl.BlockSpec((1, step, size), lambda b, i: (b, i, 0)),
            ],
            out_specs=[bounds, bounds],
        ),
        out_shape=(jax.ShapeDtypeStruct((batch, rows // padded, size), k.dtype),) * 2,
        semantics=("parallel", "parallel"), vmem_bytes=14 * 2**20, name="block_bounds",
    )  # fmt: skip
    return low.astype(dtype), high.astype(dtype)


def _whole(x, slots: tuple[int, ...], block: int, padded: int):
    """Copies packed rows so that every head holds whole blocks, of a padded number of slots."""
    parts, row = [], 0
    tail = ((0, 0),) * (x.ndim - 2)
    for size in slots:
        part = jnp.pad(x[:, row : row + size], ((0, 0), (0, -size % block), *tail))
        part = part.reshape(x.shape[0], -1, block, *x.shape[2:])
        part = jnp.pad(part, ((0, 0), (0, 0), (0, padded - block), *tail))
        parts.append(part.reshape(x.shape[0], -1, *x.shape[2:]))
        row += size
    return jnp.concatenate(parts, axis=1)


def _bound(
    mass_ref,  # [1 T/128 128]
    k_ref,  # [1 T D]
    low_ref,  # [1 T/P D]
    high_ref,  # [1 T/P D]
    *,
    group: int,  # rows at once
    block: int,  # P
):
    """Bounds the keys of one step's blocks; rows beyond the array have mass 0."""
    size, n, n_masses = k_ref.shape[2], group // block, group // 128

    def step(i, _):
        m = mass_ref[0, pl.ds(i * n_masses, n_masses), :].T
        alive = jnp.concatenate([jnp.broadcast_to(m[:, j : j + 1], (128, size)) for j in range(n_masses)]) > 0
        x = k_ref[0, pl.ds(i * group, group), :].astype(jnp.float32)
        low = jnp.where(alive, x, jnp.inf).reshape(n, block, size).min(1)
        high = jnp.where(alive, x, -jnp.inf).reshape(n, block, size).max(1)
        low_ref[0, pl.ds(i * n, n), :] = low.astype(low_ref.dtype)
        high_ref[0, pl.ds(i * n, n), :] = high.astype(high_ref.dtype)
        return 0

    jax.lax.fori_loop(0, k_ref.shape[1] // group, step, 0)
