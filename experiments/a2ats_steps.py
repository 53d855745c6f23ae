"""Times decode steps with the full cache on the device, or with A²ATS and its rows on the host."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments import decode_model
from experiments.a2ats_synthetic import filled
from experiments.cases import copy_rate, weight_bytes
from kvjax import measure, states
from kvjax.method import CacheMethod
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.states import State
from pallas_kernels import Codes, dispatch, timing

__all__ = ["timed", "tokens_read"]


def timed(model: Model, method: CacheMethod, tokens: int, rows: int, *, settings: Any) -> dict[str, Any]:
    """Decodes up to `tokens` tokens; the first two calls do not count.

    Tokens are drawn: a model of random weights may come to repeat its own, and so ask for the same rows.

    settings: `steps` of a call, `samples`, `copy_mib` and `seed`.

    Raises:
        RuntimeError: where the steps timed were not those meant.
    """
    rates = copy_rate(settings.copy_mib), _bus_rate(settings.copy_mib)  # while memory is free
    first = tokens - settings.steps * (settings.samples + 2)
    if isinstance(method, Full):
        state = decode_model.occupied(states.init_state(model, method, rows, tokens), first, settings.seed)
    else:
        state = filled(model, method, rows, first, tokens, settings.seed)
    logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
    rng, times, before = np.random.default_rng(settings.seed), [], (0.0, 0.0)
    with dispatch.watch() as taken:
        for i in range(settings.samples + 2):
            forced = rng.integers(0, model.config.vocab_size, (rows, settings.steps)).astype(np.int32)
            start = time.perf_counter()
            _, logits, state, _ = jax.block_until_ready(kvjax.decode(model, logits, state, method, forced))
            times.append((time.perf_counter() - start) / settings.steps * 1e6)
            before = tokens_read(state) if i == 1 else before
    if not bool(jnp.isfinite(logits).all()) or any(int(kv.seen.min()) != tokens for kv in state):
        raise RuntimeError("the steps that were timed went wrong: tokens are missing, or logits not finite")
    step = statistics.median(times[2:])
    n_steps = settings.steps * settings.samples
    values = {"impl": taken, "step_us": step, "tokens_per_s": rows / step * 1e6, "samples_us": times[2:]}
    counts = [(b - a) / n_steps for a, b in zip(before, tokens_read(state), strict=True)]
    values |= _floors(model, state, rates, counts)
    return values | {"fraction": max(values["device_floor_us"], values["bus_floor_us"]) / step}


def tokens_read(state: State) -> tuple[float, float]:
    """Returns the tokens read and missed so far, of all layers with a tier."""
    held = [kv.tier for kv in state if kv.tier is not None]
    return sum(_sum(t.read) for t in held), sum(_sum(t.missed) for t in held)


def _sum(x: jax.Array) -> float:
    return float(np.asarray(x, np.float64).sum())


def _floors(model: Model, state: State, rates: tuple[float, float], counts: list[float]) -> dict[str, Any]:
    """Returns the bytes that a step moves and the least time for them, by the device and by the bus."""
    read, missed = counts
    kv = state[0]
    slot = 2 * model.config.head_dim * model.dtype.itemsize
    if kv.tier is None:
        device = weight_bytes(model) + sum(int(x.fill.sum()) * (slot + 8) for x in state)
        crossed = 0.0
    else:
        index = sum(x.aux.codes.nbytes + x.aux.centroids.nbytes + x.aux.words.nbytes for x in state)
        device = weight_bytes(model) + index + read * slot
        crossed = missed * (2 * model.config.head_dim if isinstance(kv.tier.far, Codes) else slot)
    return {
        "device_bytes": device, "bus_bytes": crossed, "read_per_step": read, "missed_per_step": missed,
        "hit_rate": 1 - missed / read if read else None, "device_floor_us": device / rates[0] * 1e6,
        "bus_floor_us": crossed / rates[1] * 1e6, "copy_gb_per_s": rates[0] / 1e9,
        "bus_gb_per_s": rates[1] / 1e9, "state_bytes": measure.nbytes(state),
        "host_bytes": measure.host_bytes(state),
    }  # fmt: skip


@functools.cache
def _bus_rate(mib: int) -> float:
    return timing.host_copy_rate(mib * 2**18)
