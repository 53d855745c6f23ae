"""Times prompts: read and answered, clustered at their end, and chunk by chunk in little memory."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments import decode_model
from experiments.cases import Case, prompts
from experiments.chelsea_cases import Speed, chelsea
from experiments.chelsea_steps import filled
from kvjax import cache, measure, reading, states
from kvjax.method import CacheMethod
from kvjax.methods.chelsea import Chelsea
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.program import Program
from kvjax.states import State

__all__ = ["clustering", "serve", "served", "streamed"]


def served(model: Model, method: CacheMethod, tokens: int, rows: int, *, settings: Speed) -> dict[str, Any]:
    """Reads prompts of `tokens` tokens and decodes `settings.new`, twice: the first time compiles.

    Where fewer prompts are read than rows decoded, the time of the prefill is scaled, and the decoded rows
    are random.
    """
    n_read = min(settings.prompt_rows or rows, rows)
    ids = prompts(model, n_read, tokens, settings.seed)
    if n_read == rows:
        for last in (0, settings.new):
            prefill_s, decode_s = serve(model, method, ids, settings, stop=None if last else 1)
    else:
        for _ in range(2):
            prefill_s, _ = serve(model, method, ids, settings, stop=0)
        for stop in (1, None):
            state = filled(model, method, rows, tokens, tokens + settings.new, settings.seed)
            logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
            decode_s = _answer(model, method, logits, state, settings, stop)
            del state
        prefill_s *= rows / n_read
    return {
        "prefill_s": prefill_s, "decode_s": decode_s, "total_s": prefill_s + decode_s,
        "prefill_rows": n_read, "prefill_is_scaled": n_read != rows, "compress": settings.compress,
    }  # fmt: skip


def serve(
    model: Model, method: CacheMethod, ids: np.ndarray, settings: Speed, stop: int | None = None
) -> tuple[float, float]:
    """Returns the seconds of a prefill, and of the steps that follow it, at most `stop` of them."""
    start = time.perf_counter()
    logits, state = jax.block_until_ready(
        kvjax.prefill(model, ids, method, room=settings.new, chunk=settings.chunk, compress=settings.compress)
    )
    return time.perf_counter() - start, _answer(model, method, logits, state, settings, stop)


def _answer(
    model: Model, method: CacheMethod, logits: jax.Array, state: State, settings: Speed, stop: int | None
) -> float:
    """Returns the seconds that decoding takes, several steps a call. Consumes the state."""
    new = settings.new if stop is None else min(stop, settings.new)
    forced = np.full((len(logits), settings.steps), -1, np.int32)
    start = time.perf_counter()
    for done in range(0, new, settings.steps):
        steps = min(settings.steps, new - done)
        _, logits, state, _ = kvjax.decode(model, logits, state, method, forced, steps=steps)
    jax.block_until_ready((logits, state))
    return time.perf_counter() - start


def clustering(model: Model, method: Chelsea, case: Case, settings: Speed) -> float:
    """Returns the median seconds in which a prompt's state is clustered; the first time compiles."""
    state = states.init_state(model, method, case.batch, case.tokens, case.tokens)
    state, c = decode_model.occupied(state, case.tokens, settings.seed), model.config
    q = jnp.zeros((case.batch, 1, c.n_kv_heads, c.group, c.head_dim), model.dtype)  # Chelsea reads no queries
    pos = jnp.full((case.batch, 1), case.tokens - 1, jnp.int32)
    program, times = Program.of(model, method), []
    for _ in range(settings.samples + 1):
        start = time.perf_counter()
        jax.block_until_ready(reading._compress_all(state, (q,) * c.n_layers, pos, program))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def streamed(case: Case, settings: Speed) -> dict[str, Any]:
    """Returns the most bytes of the state, right after it was widened for a chunk, and those of the device.

    The device's peak is that of the process: it is None where something before has reached it.

    Raises:
        RuntimeError: where tokens are missing from the state.
    """
    model, method = case.model(settings.seed), chelsea(settings, case.tokens)
    ids = prompts(model, case.batch, case.tokens, settings.seed)
    before, peak = _device_peak(), 0
    state = states.init_state(model, method, case.batch, case.tokens)
    for start in range(0, case.tokens, settings.stream_chunk):
        part = ids[:, start : start + settings.stream_chunk]
        wide = jax.eval_shape(lambda s, n=part.shape[1]: states.widen(s, model, method, n), state)
        peak = max(peak, measure.nbytes(wide))
        logits, state = kvjax.prefill(
            model, part, method, chunk=settings.stream_chunk, compress="chunk", state=state
        )
        jax.block_until_ready(logits)
    masses = (cache.view(kv.mass, run).sum(-1) for kv in state for run in cache.runs(kv.slots))
    if not all(bool((mass == case.tokens).all()) for mass in masses):
        raise RuntimeError(f"clusters hold all {case.tokens} tokens of a prompt, but some are missing")
    whole = measure.nbytes(jax.eval_shape(lambda: states.init_state(model, Full(), case.batch, case.tokens)))
    after, params = _device_peak(), measure.nbytes(model.params)
    own = after - params if after > before else None
    return {
        "peak_state_bytes": peak, "full_bytes": whole, "fraction": peak / whole,
        "end_bytes": measure.nbytes(state), "device_peak_bytes": own,
        "device_fraction": None if own is None else own / whole,
    }  # fmt: skip


def _device_peak() -> int:
    """Returns the most bytes that this process had in use on the device, 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
