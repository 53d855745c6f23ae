"""Times the decode steps of a filled cache, over whole periods of clustering.

The context ends, full, at the tokens of its case: Chelsea's state starts with `slack` free slots per head,
so that a period of `slack` steps clusters once, in its last step.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import kvjax
from experiments import decode_model
from experiments.cases import copy_rate, weight_bytes
from experiments.chelsea_cases import Speed
from kvjax import cache, measure, states
from kvjax.cache import KV
from kvjax.method import CacheMethod
from kvjax.methods.chelsea import Chelsea
from kvjax.model import Model
from kvjax.states import State
from pallas_kernels import dispatch

__all__ = ["filled", "timed"]


def timed(model: Model, method: CacheMethod, tokens: int, rows: int, *, settings: Speed) -> dict[str, Any]:
    """Decodes whole periods up to `tokens` tokens; the first period compiles and does not count.

    Returns µs per step: `step_us`, the median of calls without a clustering, and `amortised_us`, the median
    of the periods' means; `cluster_us` is per clustering.

    Raises:
        RuntimeError: where the steps timed were not those meant.
    """
    rate = copy_rate(settings.copy_mib)  # while memory is free
    clusters = isinstance(method, Chelsea)
    first = tokens - settings.slack * (settings.samples + 1)
    state = filled(model, method, rows, first, tokens, settings.seed)
    n_bytes = weight_bytes(model) + _mean_slots(state, tokens, clusters, settings) * _slot_bytes(model)
    state_bytes = measure.nbytes(state)
    with dispatch.watch() as taken:
        times, state = _periods(model, method, state, settings)
    right = all(int(kv.seen.min()) == tokens for kv in state)
    if not right or (clusters and not all(_at_goal(kv, settings.slack) for kv in state)):
        raise RuntimeError("the steps that were timed went wrong: tokens are missing, or clusterings were")
    plain = [t for period in times for t in (period[:-1] if clusters else period)]
    step, whole = statistics.median(plain), statistics.median(map(statistics.mean, times))
    floor = n_bytes / rate * 1e6
    return {
        "impl": taken, "step_us": step, "amortised_us": whole, "cluster_us": (whole - step) * settings.slack,
        "cluster_share": (whole - step) / whole, "floor_us": floor, "fraction": floor / step,
        "bytes": n_bytes, "state_bytes": state_bytes, "copy_gb_per_s": rate / 1e9, "samples_us": times,
    }  # fmt: skip


def _periods(
    model: Model, method: CacheMethod, state: State, settings: Speed
) -> tuple[list[list[float]], State]:
    """Decodes greedily. Returns µs per step of each call of each period but the first, and the state.

    Raises:
        RuntimeError: where logits are not finite.
    """
    batch = state[0].seen.shape[0]
    logits = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    forced = np.full((batch, settings.steps), -1, np.int32)
    periods = []
    for _ in range(settings.samples + 1):
        times = []
        for _ in range(settings.slack // settings.steps):
            start = time.perf_counter()
            _, logits, state, _ = jax.block_until_ready(kvjax.decode(model, logits, state, method, forced))
            times.append((time.perf_counter() - start) / settings.steps * 1e6)
        periods.append(times)
    if not bool(jnp.isfinite(logits).all()):
        raise RuntimeError("the steps that were timed went wrong: their logits are not finite")
    return periods[1:], state


def _at_goal(kv: KV, slack: int) -> bool:
    """Says whether a clustering has just left `slack` slots of every head free."""
    return bool((cache.count(kv) == jnp.asarray(kv.slots) - slack).all())


def _mean_slots(state: State, tokens: int, clusters: bool, settings: Speed) -> float:
    """Returns the occupied slots that a step of those timed reads on the average, of all rows and heads."""
    batch, counted = state[0].seen.shape[0], settings.slack * settings.samples
    if not clusters:
        return batch * sum(len(kv.slots) for kv in state) * (tokens - (counted - 1) / 2)
    n_plain = settings.slack - settings.steps  # steps of a period in calls without clustering
    free = settings.slack - (n_plain + 1) / 2
    return batch * sum(sum(kv.slots) - len(kv.slots) * free for kv in state)


def _slot_bytes(model: Model) -> int:
    return 2 * model.config.head_dim * model.dtype.itemsize + 8


def filled(model: Model, method: CacheMethod, batch: int, seen: int, total: int, seed: int) -> State:
    """Returns a state for `total` tokens as if `seen` random ones had been read.

    In a clustered head `slack` slots of the budget are free; sinks and recent tokens stand alone.

    Raises:
        ValueError: for fewer tokens than a head holds.
    """
    state = states.init_state(model, method, batch, total)
    held = 1 if not isinstance(method, Chelsea) else max(max(kv.slots) for kv in state) - method.n_free
    if seen < held:
        raise ValueError(
            f"a context fills its slots before its steps are timed, got {held} slots for {seen} of {total} "
            "tokens: take more tokens, or lower keep, slack or samples"
        )
    if not isinstance(method, Chelsea):
        return decode_model.occupied(state, seen, seed)
    left, done = list(state)[::-1], []
    del state
    for key in jax.random.split(jax.random.key(seed), len(left)):
        kv = left.pop()
        fill = np.asarray(kv.slots, np.int32) - method.n_free
        heads = [_tokens(n, s, seen, method) for n, s in zip(fill.tolist(), kv.slots, strict=True)]
        pos, mass = (np.concatenate(x) for x in zip(*heads, strict=True))
        done.append(_fill(kv, key, pos.astype(np.int32), mass.astype(np.float32), fill, np.int32(seen)))
    return tuple(done)


def _tokens(n: int, size: int, seen: int, method: Chelsea) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and masses of a head of `size` slots, of which n hold `seen` tokens in order."""
    newest = method.matching.newest(n)
    n_middle, end = n - method.n_sinks - newest, seen - newest
    middle = np.linspace(method.n_sinks, end, n_middle, endpoint=False).astype(int)
    pos = np.concatenate([np.arange(method.n_sinks), middle, np.arange(end, seen)])
    mass = np.diff(pos, append=seen)
    return np.pad(pos, (0, size - n)), np.pad(mass, (0, size - n))


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)  # else a second cache
def _fill(kv: KV, key: Array, pos: Array, mass: Array, fill: Array, seen: Array) -> KV:
    """Returns random keys and values with the given positions, masses and counts, alike in every row."""
    keys, values = (jax.random.normal(k, kv.k.shape, kv.k.dtype) for k in jax.random.split(key))
    rows = {"pos": pos, "mass": mass, "fill": fill, "seen": seen}
    return kv.replace(
        k=keys, v=values, **{name: jnp.broadcast_to(x, getattr(kv, name).shape) for name, x in rows.items()}
    )
