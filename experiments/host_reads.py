"""Times reads of places in host memory, by `fetch_rows`: how far they spread, and how many bytes each has.

Where a place takes as long whatever its bytes, the translation of its address binds, and not the bus.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.rows import measured, start
from pallas_kernels import fetch_rows, timing
from pallas_kernels.host import Blocks

__all__ = ["Reads", "reads"]

_SIZE = 64  # channels of a row in bfloat16: a slot's key and value are 256 bytes
_SLOT = 2 * 2 * _SIZE
_SETS = 4  # lists of places that take turns


@dataclass(frozen=True)
class Reads:
    """Which reads to time.

    Args:
        gib: host memory that places are drawn from.
        place_bytes: bytes of a place, a multiple of 256.
        mib: bytes of one call.
        samples: timed repetitions, of which the median counts.
        seed: draws the places.
        out: the folder of results.
    """

    gib: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 16)
    place_bytes: tuple[int, ...] = (256, 512, 1024, 4096)
    mib: float = 8
    samples: int = 15
    seed: int = 0
    out: Path = results.FOLDER


def reads(settings: Reads) -> int:
    """Times what is not stored yet, prints the rows and claims the slowest place and the fastest rate.

    Raises:
        ValueError: for places that are no whole slots.
    """
    if rest := [n for n in settings.place_bytes if n < _SLOT or n % _SLOT]:
        raise ValueError(f"a place has a multiple of {_SLOT} bytes, got {rest}")
    stored, rows = start("a2ats", "reads", settings), []
    for gib in settings.gib:
        n_slots = int(gib * 2**30) // _SLOT
        far = jnp.zeros((1, 2 * n_slots, _SIZE), jnp.bfloat16)
        far = jax.device_put(far, jax.memory.Space.Host)
        for place_bytes in settings.place_bytes:
            for order in ("drawn", "ascending"):
                row = {"gib": gib, "place_bytes": place_bytes, "order": order}
                stored = measured(stored, row, lambda row=row, far=far: _timed(far, settings, **row))
                rows.append(stored.find(row))
        del far
    most, best = max(row["place_ns"] for row in rows), max(row["gb_per_s"] for row in rows)
    stored = stored.claim({"reads.slowest_place_ns": most, "reads.fastest_gb_per_s": best})
    print(stored.path)
    return 0


def _timed(far: jax.Array, settings: Reads, gib: float, place_bytes: int, order: str) -> dict[str, Any]:
    """Returns what a place takes, and the rate."""
    block, n_slots = place_bytes // _SLOT, far.shape[1] // 2
    n_places, n_blocks = max(1, int(settings.mib * 2**20) // place_bytes), n_slots // block
    n_places, rng = min(n_places, n_blocks), np.random.default_rng(settings.seed)
    near = (jnp.zeros((1, n_places * block, _SIZE), jnp.bfloat16),) * 2
    staged = (jnp.zeros((1, 1, 1, _SIZE), jnp.bfloat16),) * 2
    sets = []
    for _ in range(_SETS):
        places = rng.choice(n_blocks, n_places, replace=False)
        places = np.sort(places) if order == "ascending" else places
        idx = jnp.asarray(places[None, None], jnp.int32)
        sets.append({"near": near, "far": far, "staged": staged, "idx": idx})
    line, first = jnp.arange(n_places)[None, None], jnp.full((1, 1), n_slots)

    def read(x: dict[str, Any]) -> tuple:
        return fetch_rows(**x, line=line, first=first, blocks=Blocks((n_slots,), block))

    time_us = timing.time_us(read, sets, settings.samples)
    rate = n_places * place_bytes / time_us / 1e3
    return {"places": n_places, "time_us": time_us, "place_ns": time_us * 1e3 / n_places, "gb_per_s": rate}
