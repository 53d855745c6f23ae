"""Times ops on the device at hand: several input sets in one program, medians, inputs beyond the cache.

Work is queued until it takes long enough that the host's share is small, and waited for once.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.op import Spec

__all__ = ["copy_rate", "host_copy_rate", "input_sets", "layers", "n_sets", "race", "time_us"]

_BEYOND_CACHE = 512 * 2**20  # bytes that all input sets hold together, at least: ten times an H100's L2
_MOST = 2**34  # bytes that all hold together at most, but for four: XLA pins 64 GB of a host, an L4 has 24
_SPAN_S = 0.04  # one sample lasts at least this long: the host takes 0.1 ms to start it


def n_sets(spec: Spec) -> int:
    """Returns how many input sets ("layers") are together larger than any cache, but fit into memory.

    Of a case that reads few of its rows, sets that move enough may be too large to hold.
    """
    arrays = jax.tree.leaves(jax.eval_shape(spec.arrays, jax.random.key(0)))
    held = sum(x.size * x.dtype.itemsize for x in arrays)
    return max(4, min(32, -(-_BEYOND_CACHE // max(spec.bytes(), 1)), _MOST // max(held, 1)))


def input_sets(spec: Spec, seed: int = 0) -> list[dict[str, Any]]:
    """Makes the inputs of several calls, together larger than any cache."""
    make = jax.jit(spec.arrays)
    return [make(key) for key in jax.random.split(jax.random.key(seed), n_sets(spec))]


def layers(run: Callable[[Any], Any], sets: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """Compiles a function of one input set into a program of several ("layers")."""
    layer = jax.jit(run)  # traced once, and not once per layer
    return jax.jit(lambda sets: [layer(x) for x in sets]).lower(sets).compile()


def race(
    programs: Mapping[str, tuple[Callable[[Sequence[Any]], Any], Sequence[Any]]], samples: int = 15
) -> dict[str, tuple[float, float]]:
    """Returns, per program, the median time of one call in µs and the spread of the middle half.

    The programs take turns, so that what drifts on the machine drifts for all.

    Args:
        programs: one made by `layers`, and the input sets that it runs on.
    """
    counts, times = {}, {name: [] for name in programs}
    for name, (run, sets) in programs.items():
        jax.block_until_ready(run(sets))
        start = time.perf_counter()
        jax.block_until_ready(run(sets))
        counts[name] = max(1, round(_SPAN_S / (time.perf_counter() - start)))
    for _ in range(samples):
        for name, (run, sets) in programs.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                out = run(sets)
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / (counts[name] * len(sets)) * 1e6)
    quarters = {name: statistics.quantiles(t, n=4) for name, t in times.items()}
    return {name: (middle, high - low) for name, (low, middle, high) in quarters.items()}


def time_us(run: Callable[[Any], Any], sets: Sequence[Any], samples: int = 15) -> float:
    """Returns the median time of one call in µs."""
    return race({"": (layers(run, sets), sets)}, samples)[""][0]


def copy_rate(size: int = 2**30) -> float:
    """Returns the rate of a device copy in bytes/s, counting bytes read and bytes written."""
    x = [jnp.arange(size // 4, dtype=jnp.float32) + i for i in range(2)]
    return 2 * size / (time_us(lambda x: x + 1.0, x) * 1e-6)


def host_copy_rate(size: int = 2**28) -> float:
    """Returns the rate of copies from pinned host memory to the device, in bytes/s."""
    device = jax.devices()[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    x = [jax.device_put(jnp.arange(size // 4, dtype=jnp.float32) + i, host) for i in range(4)]
    return size / (time_us(lambda x: jax.device_put(x, jax.memory.Space.Device), x) * 1e-6)
