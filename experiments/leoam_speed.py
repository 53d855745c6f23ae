"""Times steps of contexts that lie on a disk: LeoAM beside what reads all of it, within the same budgets.

    full        every step reads every row: of as many layers as fit the host from pinned memory
    prefetch    the same; threads read each other layer's rows from the disk while the one before computes
    fixed       LeoAM with leaves as large as chunks of the disk, known by boxes, and nothing read ahead
    fixed-host  as fixed, the abstracts on the host
    fixed-equal as fixed, of as many tokens as catch the attention that leoam's catch (`equal`)
    leoam       leaves of 32, known by their means, and what the next layer may ask for read ahead
    leoam4      the same, a share of the chunks in 4 bits
    leoam-host  as leoam, the abstracts on the host as well

A budget of 2 GB on the device and 8 GB on the host emulates a commodity machine; K, V and abstracts count.
The pool begins full of the first chunks of each head. `computing` is the part of a step in which no layer
waits for rows; `disk` and `link` are the parts in which one waits for the disk, or for rows that are there to
reach the device.
"""

import dataclasses
import functools
import shlex
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments import decode_model, options, results
from experiments.cases import Case, case_of
from experiments.leoam_synthetic import filled, spread, written
from experiments.results import Results
from experiments.streamed import Streamed
from kvjax import bandwidths, disk, measure
from kvjax.disk import Disk
from kvjax.disk_pace import Traffic
from kvjax.method import CacheMethod
from kvjax.methods.leoam import LeoAM
from kvjax.model import Model
from kvjax.states import State

__all__ = ["Speed", "speed"]


@dataclass(frozen=True)
class Speed:
    """What to time. A case is shape:batch x tokens; shape/8 takes 8 layers of it.

    Args:
        cases: contexts.
        names: what to time in each, the full cache first.
        topk: share of the tokens that a step chooses.
        equal: share that chunks of a fixed size need for the same attention, the mean of three models by
            `leoam recall`.
        overlap: share of a step's chunks that the step before chose too, on real models; a row has its own.
        device_gb: of K, V and abstracts on the device, in 10^9 bytes.
        host_gb: of K and V on the host.
        chunk: tokens that the disk reads together.
        steps: decode steps in one call of LeoAM; the others, which take long, do one.
        samples: calls timed, after those that compile and fill the lines.
        warm: such calls.
        disk: a folder for the contexts, which are removed.
        seed: of weights, contexts and tokens.
        out: the folder of results.
    """

    cases: tuple[str, ...] = (*(f"llama-3.1-8b:{b}x32768" for b in (1, 4, 8)), "longchat-7b:1x32768")
    names: tuple[str, ...] = ("full", "prefetch", "fixed", "leoam", "leoam4", "leoam-host")
    topk: float = 0.035
    equal: float = 0.058
    overlap: float = 0.55
    device_gb: float = 2.0
    host_gb: float = 8.0
    chunk: int = 32
    steps: int = 16
    samples: int = 3
    warm: int = 3
    disk: Path = Path("leoam_speed")
    seed: int = 0
    out: Path = results.FOLDER


def speed(settings: Speed) -> int:
    """Measures what is not stored yet, prints a line for each row, and returns 0.

    Raises:
        ValueError: for an unknown name, or a case that is none.
    """
    if unknown := sorted(set(settings.names) - _NAMES.keys()):
        raise ValueError(f"a name is one of {', '.join(_NAMES)}, got {', '.join(unknown)}")
    cases = [case_of(word) for word in settings.cases]
    words = ["python -m experiments.leoam speed"]
    words += map(shlex.quote, options.as_arguments(settings, skip=("out", "disk")))
    stored = results.start("leoam_speed", settings.seed, None, settings.out, " ".join(words))
    stored = _bandwidths(settings, stored)
    for case in cases:
        stored = _case(settings, stored, case, cases)
    print(stored.path)
    return 0


def _bandwidths(settings: Speed, stored: Results) -> Results:
    """Measures what bytes can move at, once."""
    wanted = {"part": "bandwidths"}
    if stored.find(wanted) is None:
        settings.disk.mkdir(parents=True, exist_ok=True)
        stored = stored.add(wanted, dataclasses.asdict(bandwidths.measure(settings.disk)))
    found = {k: v for k, v in stored.find(wanted).items() if k not in ("settings", *wanted)}
    print(
        *(f"{k} {v / 1e9:.1f} GB/s" if v > 1 else f"{k} {v}" for k, v in found.items()), sep=" | ", flush=True
    )
    return stored


def _case(settings: Speed, stored: Results, case: Case, cases: Sequence[Case]) -> Results:
    """Times every name on the same files; what the rows of all cases say is claimed with each."""
    missing = [name for name in settings.names if stored.find(case.row("decode", name)) is None]
    seen = _seen(settings, case)
    if missing:
        model, started = case.model(settings.seed), time.perf_counter()
        method = _leoam(settings, case, int4="leoam4" in missing, abstracts="host")  # of the least memory
        written(model, method, case.batch, case.tokens, seen, settings.seed)
        print(f"{case.label}: written in {time.perf_counter() - started:.0f} s", flush=True)
    for name in settings.names:
        if name in missing:
            stored = stored.add(case.row("decode", name), _timed(settings, case, name, model, seen))
            stored = stored.claim(_claims(settings, stored, cases))
            Disk.close_all()
        row = stored.find(case.row("decode", name))
        print(
            f"{case.label} {name}: {row['step_us'] / 1e3:.1f} ms a step, {row['hit_rate']:.1%} found on the "
            f"device, {row['pooled']:.1%} on the host, {row['expected']:.1%} read ahead, "
            f"{row['disk_bytes'] / 2**20:.1f} MiB from disk, computing {row['computing']:.2f}, "
            f"disk {row['disk']:.2f}, link {row['link']:.2f}",
            flush=True,
        )
    shutil.rmtree(settings.disk, ignore_errors=True)
    return stored


def _seen(settings: Speed, case: Case) -> int:
    """Returns the tokens of a context: whole chunks, with room for all steps."""
    return (
        (case.tokens - settings.steps * (settings.samples + settings.warm)) // settings.chunk * settings.chunk
    )


def _method(settings: Speed, case: Case, name: str) -> CacheMethod:
    return _NAMES[name](settings, case)


def _leoam(
    settings: Speed,
    case: Case,
    *,
    share: float | None = None,
    leaf: int = 32,
    known_by: str = "mean",
    **more: Any,
) -> LeoAM:
    share = settings.topk if share is None else share
    return LeoAM(
        topk=int(share * case.tokens), leaf=leaf, root=None, known_by=known_by,
        chunk=settings.chunk, disk=str(settings.disk), device_budget=int(settings.device_gb * 1e9),
        host_budget=int(settings.host_gb * 1e9), **more,
    )  # fmt: skip


def _fixed(settings: Speed, case: Case, **more: Any) -> LeoAM:
    return _leoam(settings, case, leaf=settings.chunk, known_by="box", ahead=False, **more)


def _fixed_equal(settings: Speed, case: Case) -> LeoAM:
    return _fixed(settings, case, share=settings.equal)


def _streamed(settings: Speed, case: Case, *, ahead: bool) -> Streamed:
    c = decode_model.config_of(case.shape, case.layers)
    layer_bytes = 4 * case.batch * c.n_kv_heads * c.head_dim * case.tokens
    resident = min(int(settings.host_gb * 1e9 / layer_bytes), c.n_layers)
    return Streamed(str(settings.disk), settings.chunk, resident, ahead)


_NAMES = {
    "full": functools.partial(_streamed, ahead=False),
    "prefetch": functools.partial(_streamed, ahead=True),
    "fixed": _fixed,
    "fixed-host": functools.partial(_fixed, abstracts="host"),
    "fixed-equal": _fixed_equal,
    "leoam": _leoam,
    "leoam4": functools.partial(_leoam, int4=True),
    "leoam-host": functools.partial(_leoam, abstracts="host"),
}


def _timed(settings: Speed, case: Case, name: str, model: Model, seen: int) -> dict[str, Any]:
    """Decodes; the calls that compile and fill the lines do not count.

    Raises:
        RuntimeError: where logits are not finite.
    """
    method = _method(settings, case, name)
    n_steps, warm = (settings.steps, settings.warm) if isinstance(method, LeoAM) else (1, 2)
    tau, overlap = _tau(settings, case, method, model) if isinstance(method, LeoAM) else (0.0, 1.0)
    state = filled(model, method, case.batch, case.tokens, seen, tau, settings.seed)
    logits = jnp.zeros((case.batch, model.config.vocab_size), jnp.float32)
    rng, times, before = np.random.default_rng(settings.seed), [], None
    for i in range(warm + settings.samples):
        forced = rng.integers(0, model.config.vocab_size, (case.batch, n_steps)).astype(np.int32)
        start = time.perf_counter()
        _, logits, state, _ = jax.block_until_ready(kvjax.decode(model, logits, state, method, forced))
        times.append((time.perf_counter() - start) / n_steps * 1e6)
        before = _counted(state) if i == warm - 1 else before
    if not bool(jnp.isfinite(logits).all()):
        raise RuntimeError("the steps that were timed went wrong: logits are not finite")
    step = statistics.median(times[warm:])
    moved = {k: v - before[k] for k, v in _counted(state).items()}
    values = _parts(moved, sum(times[warm:]) / 1e6 * n_steps, n_steps * settings.samples)
    return {
        "step_us": step,
        "samples_us": times[warm:],
        "chosen": method.topk if isinstance(method, LeoAM) else case.tokens,
        "tau": tau,
        "overlap": overlap,
        "state_bytes": measure.nbytes(state),
        **values,
    }


def _tau(settings: Speed, case: Case, method: LeoAM, model: Model) -> tuple[float, float]:
    n_leaves = -(-case.tokens // method.leaf)
    n = -(-method.topk // method.leaf)
    return spread(n_leaves, n, model.config.group, method.known_by, settings.overlap, settings.seed)


def _counted(state: State) -> dict[str, float]:
    """Returns what has moved so far, of all layers."""
    found = disk.traffic(state)
    counts = {f.name: float(sum(getattr(t, f.name) for t in found)) for f in dataclasses.fields(Traffic)}
    held = [kv.tier for kv in state]
    counts |= {
        k: float(sum(np.asarray(getattr(t, k), np.float64).sum() for t in held)) for k in ("read", "missed")
    }
    return counts


def _parts(moved: dict[str, float], seconds: float, n_steps: int) -> dict[str, float]:
    """Returns a step's shares of time, of what it reads, and its bytes."""
    asked = max(moved["asked"], 1)
    read = moved["read_bytes"] + moved["read4_bytes"]
    return {
        "computing": 1 - moved["busy_s"] / seconds, "disk": moved["waited_s"] / seconds,
        "link": (moved["busy_s"] - moved["waited_s"]) / seconds,
        "hit_rate": 1 - moved["missed"] / moved["read"] if moved["read"] else 0.0,
        "pooled": moved["pooled"] / asked, "expected": moved["expected"] / asked,
        "disk_bytes": read / n_steps, "disk_bytes_4bit": moved["read4_bytes"] / n_steps,
        "sent_bytes": moved["sent_bytes"] / n_steps,
    }  # fmt: skip


def _claims(settings: Speed, stored: Results, cases: Sequence[Case]) -> dict[str, float]:
    """Returns how many times as long the others' steps take as those of the first LeoAM, where stored."""
    own = next((name for name in settings.names if name.startswith("leoam")), None)
    if own is None:
        return {}
    found, ratios = {}, []
    for case in cases:
        rows = {name: row for name in settings.names if (row := stored.find(case.row("decode", name)))}
        for name in rows.keys() - {own} if own in rows else ():
            found[f"leoam.speedup_over_{name}_{case.label}"] = rows[name]["step_us"] / rows[own]["step_us"]
        if {"full", own} <= rows.keys():
            ratios.append(found[f"leoam.speedup_over_full_{case.label}"])
            if case.batch == 8 and case.layers is None:
                found["leoam.latency_speedup_batch8"] = ratios[-1]
    return found | ({"leoam.latency_speedup_mean": float(np.mean(ratios))} if ratios else {})
