"""Says before a state is made whether its rows fit into host memory: what is free, and what XLA may pin."""

import os
from pathlib import Path
from typing import Any, ClassVar

import jax

from kvjax import disk
from pallas_kernels import Codes

__all__ = ["check_memory"]


def check_memory(state: Any) -> None:
    """Raises MemoryError where the host has less free memory than states will take, if it says how much.

    state: shapes of the layers.
    """
    stores = [kv.tier.far for kv in state if kv.tier is not None and not disk.on_disk(kv)]
    rows = jax.tree.leaves([store.codes if isinstance(store, Codes) else store for store in stores])
    rows += jax.tree.leaves(
        [getattr(kv.aux, "far", None) for kv in state]
    )  # a method's index, see `far_tree`
    needed, here = sum(x.size * x.dtype.itemsize for x in rows), _here()
    needed += sum(disk.pool_bytes(kv) for kv in state if disk.on_disk(kv))
    free = _free(here)
    if free is not None and needed > free:
        raise MemoryError(
            f"K and V fit into host memory, got {needed / 2**30:.1f} GiB for {free / 2**30:.1f} GiB that are "
            "free: take fewer rows, a shorter context, or codes of 8 bits"
        )
    _Pinned.most = max(_Pinned.most, here + needed)


class _Pinned:
    """What XLA has taken of the host for a GPU; it keeps that for new arrays when the old ones are gone."""

    most: ClassVar[int] = 0  # bytes of rows that lay there at once


def _here() -> int:
    """Returns the bytes of the arrays that lie on the host."""
    return sum(x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind == "pinned_host")


def _free(here: int) -> int | None:
    """Returns the bytes that rows may still take, of the machine or of this process's control group.

    here: what rows take already.
    """
    found = [
        int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")
    ]
    limit, held = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and held and limit[0].isdecimal():
        found.append(int(limit[0]) - int(held[0]))
    if jax.default_backend() == "gpu":
        found = [x + max(_Pinned.most - here, 0) for x in found]
        most = int(os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "64")) << 30  # what XLA pins at most
        found.append(most - here)
    return min(found, default=None)


def _lines(path: str) -> list[str]:
    """Returns the lines of a file, none where there is no such file."""
    try:
        return Path(path).read_text(encoding="ascii").split("\n")
    except OSError:
        return []
