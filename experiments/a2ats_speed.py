"""Times A²ATS with K and V on the host against the full cache on the device, in one run.

    throughput   tokens per second of the largest batches that each can hold
    small        the same for one row, which the device holds easily
    split        what a step of the host tier takes: weights, ranking, bringing rows, attention
    context      a step of one row with the longest context
    prefill      the device's memory while a prompt is read into the host; in a process of its own

Weights and caches are random, with lines of the device that find as many tokens as on real models, see
`a2ats_synthetic` and `a2ats hits`. Two floors of a step: the bytes of weights, codes and chosen rows at the
device's copy rate, and the rows that were missed at the rate of the bus, both measured by the same process.
"""

import dataclasses
import functools
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import kvjax
from experiments import decode_model, options, results
from experiments.a2ats_split import split
from experiments.a2ats_steps import timed
from experiments.a2ats_synthetic import Locality, books, filled, locality
from experiments.cases import Case, case_of, fitting, prompts, weight_bytes
from experiments.results import Results
from kvjax import tiers
from kvjax.methods.a2ats import A2ATS
from kvjax.methods.full import Full
from kvjax.model import Model

__all__ = ["Speed", "speed"]


@dataclass(frozen=True)
class Speed:
    """What to time. A case is shape:batch x tokens; shape/8 takes 8 layers of it.

    Args:
        parts: which to run now; a later run of the same command adds others to the same file.
        cases: of the full cache, with the largest batch that it can hold.
        small: of both, with as many rows.
        bits: of rows on the host: 16 as they are, 8 as codes.
        context: of the longest context, on the host.
        prompt: of the prompt that is read.
        topk: share of the tokens that each query head chooses.
        hot: share of the tokens that the device holds.
        hit_rate: share of what a step reads that real models find among them.
        host_gib: host memory that K and V may take.
        steps: decode steps in one call.
        samples: calls timed, after two that compile and fill the lines.
        chunk: tokens of a prompt read at once.
        copy_mib: what is copied to measure the copy rate.
        seed: of weights, caches and prompts.
        out: the folder of results.
    """

    parts: tuple[str, ...] = ("throughput", "small", "split", "context")
    cases: tuple[str, ...] = tuple(f"llama-3.1-8b:{b}x{n * 1024}" for b, n in ((14, 32), (7, 64), (3, 128)))
    small: str = "llama-3.1-8b:1x32768"
    bits: tuple[int, ...] = (16, 8)
    context: str = "llama-3.1-8b:1x524288"
    prompt: str = "llama-3.1-8b:1x131072"
    topk: float = 0.03
    hot: float = 0.27
    hit_rate: float = 0.95
    host_gib: float = 96.0
    steps: int = tiers.STEPS
    samples: int = 3
    chunk: int = 2048
    copy_mib: int = 1024
    seed: int = 0
    out: Path = results.FOLDER


def speed(settings: Speed) -> int:
    """Measures what is not stored yet, prints a line for each row, and returns 0.

    Raises:
        ValueError: for an unknown part, a case that is none, or other bits than 8 and 16.
    """
    if unknown := sorted(set(settings.parts) - _PARTS.keys()):
        raise ValueError(f"a part is one of {', '.join(_PARTS)}, got {', '.join(unknown)}")
    if not set(settings.bits) <= {8, 16}:
        raise ValueError(f"rows on the host have 16 or 8 bits, got {settings.bits=}")
    for word in (*settings.cases, settings.small, settings.context, settings.prompt):
        case_of(word)  # a wrong one is told before anything is measured
    # Before JAX starts: what XLA pins of the host's memory at most, 64 unless told.
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(int(settings.host_gib) + 8))
    words = ["python -m experiments.a2ats speed"]
    words += map(shlex.quote, options.as_arguments(settings, skip=("out", "parts")))
    stored = results.start("a2ats_speed", settings.seed, None, settings.out, " ".join(words))
    for name in settings.parts:
        stored = _PARTS[name](settings, stored)
    print(stored.path)
    return 0


def _throughput(settings: Speed, stored: Results) -> Results:
    """Compares tokens per second of all rows that each can hold."""
    best = 0.0
    for case in map(case_of, settings.cases):
        stored, full = _timed_once(settings, stored, case, "full")
        for bits in settings.bits:
            rows = _host_rows(settings, case, bits)
            stored, row = _timed_once(
                settings, stored, dataclasses.replace(case, batch=rows), f"host, {bits} bits"
            )
            ratio = row["tokens_per_s"] / full["tokens_per_s"]
            best = max(best, ratio)
            print(f"{case.tokens} tokens, {bits} bits: {ratio:.2f} times the tokens per second")
            kilo = case.tokens // 1024
            stored = stored.claim({f"a2ats.throughput_speedup_{kilo}k_{bits}bit": ratio})
    return stored.claim({"a2ats.throughput_speedup": best})


def _small(settings: Speed, stored: Results) -> Results:
    """Compares steps of few rows."""
    case = case_of(settings.small)
    stored, full = _timed_once(settings, stored, case, "full")
    stored, row = _timed_once(settings, stored, case, f"host, {settings.bits[0]} bits")
    return stored.claim({f"a2ats.step_speedup_{case.label}": full["step_us"] / row["step_us"]})


def _split(settings: Speed, stored: Results) -> Results:
    """Takes the largest host batches' steps apart."""
    shares = []
    for case in map(case_of, settings.cases):
        rows = _host_rows(settings, case, settings.bits[0])
        case = dataclasses.replace(case, batch=rows)
        stored, whole = _timed_once(settings, stored, case, f"host, {settings.bits[0]} bits")
        wanted = case.row("split", "host")
        if stored.find(wanted) is None:
            model, method, _ = _model(settings, case, settings.bits[0])
            state = filled(
                model, method, whole["rows"], case.tokens - settings.steps, case.tokens, settings.seed
            )
            stored = stored.add(wanted, split(model, method, state, settings))
        row = stored.find(wanted)
        share = row["rank_us"] / whole["step_us"]
        shares.append(share)
        parts = ", ".join(f"{k} {row[k + '_us']:.0f}" for k in ("rank", "bring", "attend"))
        rest = whole["step_us"] - sum(row[f"{k}_us"] for k in ("rank", "bring", "attend"))
        print(f"split {case.label}: {parts}, the rest {rest:.0f} of {whole['step_us']:.0f} us", flush=True)
        stored = stored.claim({"a2ats.select_share_of_step": max(shares)})
    return stored


def _context(settings: Speed, stored: Results) -> Results:
    """Takes steps of the longest context."""
    case = case_of(settings.context)
    stored, row = _timed_once(settings, stored, case, f"host, {settings.bits[0]} bits")
    return stored.claim(
        {"a2ats.max_context_tokens": case.tokens, "a2ats.max_context_step_us": row["step_us"]}
    )


def _prefill(settings: Speed, stored: Results) -> Results:
    """Reads a prompt into the host and finds the most memory that the device needed beside the weights."""
    case = case_of(settings.prompt)
    wanted = case.row("prefill", "host")
    if stored.find(wanted) is None:
        model, method, _ = _model(settings, case, settings.bits[0])
        weights, before = weight_bytes(model), _peak()
        ids = prompts(model, case.batch, case.tokens - settings.steps, settings.seed)
        start = time.perf_counter()
        logits, state = kvjax.prefill(model, ids, method, room=settings.steps, chunk=settings.chunk)
        jax.block_until_ready(logits)
        took, after = time.perf_counter() - start, _peak()
        rows = sum(x.nbytes for kv in state for x in jax.tree.leaves(kv.rows))
        values = {"prefill_s": took, "kv_bytes": rows, "weight_bytes": weights}
        values |= {"peak_bytes": after, "peak_before_bytes": before}
        stored = stored.add(wanted, values)
    row = stored.find(wanted)
    beside = None if row["peak_bytes"] is None else row["peak_bytes"] - row["weight_bytes"]
    print(f"prefill {case.label}: {row['prefill_s']:.1f} s, {beside} bytes beside the weights")
    return (
        stored
        if beside is None
        else stored.claim({"a2ats.prefill_device_fraction": beside / row["kv_bytes"]})
    )


def _peak() -> int | None:
    """Returns the most bytes that the device has held, None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _host_rows(settings: Speed, case: Case, bits: int) -> int:
    """Returns how many rows of a case fit the host."""
    c = decode_model.config_of(case.shape, case.layers)
    row = 2 * c.n_layers * c.n_kv_heads * c.head_dim * case.tokens * bits // 8
    return max(1, int(settings.host_gib * 2**30 / row))


def _model(settings: Speed, case: Case, bits: int) -> tuple[Model, A2ATS, Locality]:
    """Returns a model with random weights, the method and what its steps choose."""
    config = decode_model.config_of(case.shape, case.layers)
    config = dataclasses.replace(config, context_length=max(config.context_length, case.tokens))
    topk, hot = int(settings.topk * case.tokens), int(settings.hot * case.tokens)
    ranked = max(1, hot - A2ATS.window - A2ATS.n_sinks)  # lines that hold no token that is always read
    found = locality(case.tokens, topk, config.group, ranked, settings.hit_rate, settings.seed)
    learnt = books(config, A2ATS.far, A2ATS.window, found.sigma, settings.seed)
    method = A2ATS(topk, learnt, tier="host", hot=hot, host_bits=None if bits == 16 else bits)
    return _random(case.shape, config, settings.seed), method, found


@functools.lru_cache(maxsize=1)
def _random(shape: str, config: Any, seed: int) -> Model:
    return decode_model.random(shape, config, seed)


def _timed_once(settings: Speed, stored: Results, case: Case, name: str) -> tuple[Results, dict]:
    """Returns the row of a decode step, which it measures where it is not stored, and prints it."""
    wanted = case.row("decode", name)
    if stored.find(wanted) is None:
        bits = 16 if name == "full" else int(name.split()[1])
        model, method, found = _model(settings, case, bits)
        method = Full() if name == "full" else method
        run = functools.partial(timed, model, method, case.tokens, settings=settings)
        rows, values = fitting(case.batch, run)
        if name != "full":
            values |= {"sigma": found.sigma, "wanted_hit_rate": settings.hit_rate}
        stored = stored.add(wanted, {"rows": rows, **values})
    row = stored.find(wanted)
    found = "" if name == "full" else ", {hit_rate:.1%} found on the device, {wanted_hit_rate:.1%} wanted"
    print(
        f"decode {case.label} {name}: {row['rows']} rows, {row['step_us']:.0f} us a step, "
        f"{row['tokens_per_s']:.0f} tokens/s, {row['fraction']:.2f} of the floor's rate"
        + found.format(**row),
        flush=True,
    )
    return stored, row


_PARTS: Mapping[str, Callable[[Speed, Results], Results]] = {
    "throughput": _throughput, "small": _small, "split": _split, "context": _context, "prefill": _prefill,
}  # fmt: skip
