"""Times decode steps of a model that leaves activations out against the dense one, in one run.

    sparsity   methods at equal sparsity, for one row and for batches; int8 weights beside
    together   with Chelsea and with quantised caches at a long context: do the gains multiply?
    here       a real model with thresholds of its own, on this device; a CPU leaves nothing unread

Weights are random, masks are like a real model's, see `chess_steps`. The floor of a step is the time that its
bytes take at the copy rate measured by the same process: the weights that it reads, counted in steps from the
same state, and the cache. `bytes_allow` is the ratio of the dense step's bytes to these.
"""

import functools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvjax
from experiments import options, results
from experiments.cases import Case, case_of, copy_rate, random_model, weight_bytes
from experiments.chess_steps import skipped_bytes, state_of, synthetic, timed
from experiments.results import Results
from kvjax import spec, text
from kvjax.calibrate import chess
from kvjax.method import CacheMethod
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.models.quantize import quantize
from kvjax.sparsity import SPARSITIES
from kvjax.thresholds import ActivationSparsity, Site, Thresholds

__all__ = ["Speed", "speed"]


@dataclass(frozen=True)
class Speed:
    """What to time. A case is shape:batch x tokens in the cache; shape/8 takes 8 layers of it.

    Args:
        pattern: a stored result of `chess quality`, whose masks are imitated.
        parts: which to run now; a later run of the same command adds others to the same file.
        cases: of the part `sparsity`; methods other than the first ones are timed in the first case alone.
        methods: such as chess:plus=True; the first two are timed in all cases.
        sparsities: shares of the activations that are left out.
        together: the case of that part.
        here: the model of that part.
        caches: cache methods beside the full cache; {budget} is a fifth of the tokens.
        steps: decode steps in one call.
        samples: calls timed, after one that compiles.
        copy_mib: what is copied to measure the copy rate.
        seed: of weights, caches and masks.
        out: the folder of results.
    """

    pattern: Path
    parts: tuple[str, ...] = ("sparsity", "together")
    cases: tuple[str, ...] = tuple(f"llama-3.1-8b:{b}x1024" for b in (1, 2, 4, 8))
    methods: tuple[str, ...] = ("chess:plus=True", "chess", "cats", "teal")
    sparsities: tuple[float, ...] = (0.5, 0.7)
    together: str = "llama-3.1-8b:1x131072"
    here: str = "smollm2-135m"
    caches: tuple[str, ...] = ("chelsea:budget={budget}", "kivi8", "kivi4")
    steps: int = 64
    samples: int = 9
    copy_mib: int = 1024
    seed: int = 0
    out: Path = results.FOLDER


def speed(settings: Speed) -> int:
    """Measures what is not stored yet, prints a line for each row, and returns 0.

    Raises:
        ValueError: for an unknown part or a case that is none, or a pattern without the methods asked.
    """
    if unknown := sorted(set(settings.parts) - _PARTS.keys()):
        raise ValueError(f"a part is one of {', '.join(_PARTS)}, got {', '.join(unknown)}")
    for word in (*settings.cases, settings.together):
        case_of(word)
    pattern = json.loads(settings.pattern.read_text(encoding="utf-8"))
    for name in settings.methods:
        for share in settings.sparsities:
            _rates(pattern, name, share)
    words = ["python -m experiments.chess speed"]
    words += map(shlex.quote, options.as_arguments(settings, skip=("out", "parts")))
    stored = results.start("chess_speed", settings.seed, None, settings.out, " ".join(words))
    for name in settings.parts:
        stored = _PARTS[name](settings, stored, pattern)
    random_model.cache_clear()
    _synthetic.cache_clear()
    print(stored.path)
    return 0


def _rates(pattern: Mapping[str, Any], name: str, share: float) -> np.ndarray | None:
    """Returns the rates of the gate's channels of a method; None where it has no gate.

    Raises:
        ValueError: where the pattern lacks them.
    """
    if Site.FFN_GATE not in spec.parse(name, SPARSITIES).sites:
        return None
    for row in pattern["rows"]:
        if (row["name"], row["sparsity_asked"], row["form"]) == (name, share, "closed"):
            return np.asarray(row["rates"])
    raise ValueError(f"a pattern has the methods that are timed, got none of {name!r} at {share}")


def _sparsity(settings: Speed, stored: Results, pattern: Mapping[str, Any]) -> Results:
    """Times each method in each case beside the dense model, and int8 weights in the first case."""
    for i, case in enumerate(map(case_of, settings.cases)):
        methods = settings.methods if i == 0 else settings.methods[:2]
        base = None
        for bits in (16, 8) if i == 0 else (16,):
            for name, share in [("dense", 0.0), *((m, s) for m in methods for s in settings.sparsities)]:
                row = case.row("sparsity", name, sparsity=share, weight_bits=bits)
                stored, base = _measured(settings, stored, case, row, "full", base, pattern)
                stored = stored.claim(_claims(stored.rows))
    return stored


def _together(settings: Speed, stored: Results, pattern: Mapping[str, Any]) -> Results:
    """Times dense and sparse, with the full cache and with others."""
    case, base = case_of(settings.together), None
    share = settings.sparsities[0]
    for cache in ("full", *settings.caches):
        for name in ("dense", settings.methods[0]):
            row = case.row("together", name, cache=cache, sparsity=share if name != "dense" else 0.0)
            stored, base = _measured(settings, stored, case, row, cache, base, pattern)
    rows = [r for r in stored.rows if r["part"] == "together"]
    off = {f"chess.together_{r['name']}_{r['cache']}": r["speedup"] / r["bytes_allow"] for r in rows}
    return stored.claim(off)


def _here(settings: Speed, stored: Results, pattern: Mapping[str, Any]) -> Results:
    """Times steps of a real model after a text, dense and sparse in turn."""
    model, n = kvjax.load(settings.here), settings.steps * (settings.samples + 1)
    documents = text.documents(model.tokenizer, (text.PROSE,), 9, 512, settings.seed)
    methods = [
        spec.parse(name, SPARSITIES, sparsity=share)
        for name in settings.methods
        for share in settings.sparsities
    ]
    found = chess.closed_form(chess.Passes(model, documents[:8]), methods)
    spec_of, base = f"{settings.here} {model.dtype.name}", None
    for sparse in (None, *found):
        name, share = ("dense", 0.0) if sparse is None else (repr(sparse.method), sparse.method.sparsity)
        row = {"part": "here", "name": name, "sparsity": share, "spec": spec_of, "batch": 1, "slots": 512 + n}
        if stored.find(row) is None:
            one = model if sparse is None else sparse.apply(model)
            state = kvjax.prefill(one, documents[8:], room=n)[1]
            values = timed(one, Full(), state, settings.steps, settings.samples)
            values["speedup"] = (base or values)["step_us"] / values["step_us"]
            stored = stored.add(row, values).claim({f"chess.here_{name}": values["speedup"]})
        base = base or stored.find(row)
        print(f"here {name}: {stored.find(row)['speedup']:.3f} times", flush=True)
    return stored


def _measured(
    settings: Speed,
    stored: Results,
    case: Case,
    row: dict[str, Any],
    cache: str,
    base: Mapping[str, Any] | None,
    pattern: Mapping[str, Any],
) -> tuple[Results, Mapping[str, Any]]:
    """Adds a row unless it is stored, and prints it. Returns the row that others are compared with, too."""
    if stored.find(row) is None:
        rate = copy_rate(settings.copy_mib)
        model = case.model(settings.seed)
        found = _thresholds(settings, case, row, pattern)
        model = quantize(model) if row.get("weight_bits") == 8 else model
        method = spec.parse(cache.format(budget=case.tokens // 5))
        stored = stored.add(row, _timed(settings, case, model, found, method, rate, base))
    done = stored.find(row)
    print(
        f"{row['part']} {case.label} {row['name']} {row['sparsity']:g} {cache} "
        f"{row.get('weight_bits', 16)} bits: {done['step_us']:.0f} us, {done['fraction']:.0%} of the limit, "
        f"{done['speedup']:.3f} times, bytes allow {done['bytes_allow']:.3f}",
        flush=True,
    )
    return stored, base or done


def _thresholds(
    settings: Speed, case: Case, row: Mapping[str, Any], pattern: Mapping[str, Any]
) -> Thresholds | None:
    if row["name"] == "dense":
        return None
    method = spec.parse(row["name"], SPARSITIES, sparsity=row["sparsity"])
    rates = _rates(pattern, row["name"], row["sparsity"])
    at = None if rates is None else tuple(rates)
    return _synthetic(case.shape, case.layers, method, at, row["slots"], settings.seed)


@functools.lru_cache(maxsize=8)
def _synthetic(
    shape: str,
    n_layers: int | None,
    method: ActivationSparsity,
    rates: tuple[float, ...] | None,
    tokens: int,
    seed: int,
) -> Thresholds:
    """Returns what `synthetic` finds; batches and widths of weights share it."""
    rates = None if rates is None else np.asarray(rates)
    return synthetic(random_model(shape, n_layers, seed), method, rates, tokens, seed)


def _timed(
    settings: Speed,
    case: Case,
    model: Model,
    thresholds: Thresholds | None,
    method: CacheMethod,
    rate: float,
    base: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns the figures of a row."""
    first = case.tokens - settings.steps * (settings.samples + 1)
    state = state_of(model, method, case.batch, first, case.tokens, settings.seed)
    skipped, shares = 0.0, {}
    if thresholds is not None:
        skipped, shares = skipped_bytes(model, thresholds, method, state, settings.seed)
    sparse = model if thresholds is None else thresholds.apply(model)
    found = timed(sparse, method, state, settings.steps, settings.samples)
    n_bytes = weight_bytes(model) + found["state_bytes"] - skipped
    floor = n_bytes / rate * 1e6
    base = base or {"step_us": found["step_us"], "bytes": n_bytes}
    return found | {
        "bytes": n_bytes, "zeros": shares, "floor_us": floor, "fraction": floor / found["step_us"],
        "copy_gb_per_s": rate / 1e9, "speedup": base["step_us"] / found["step_us"],
        "bytes_allow": base["bytes"] / n_bytes,
    }  # fmt: skip


def _claims(rows: tuple[dict, ...]) -> dict[str, float]:
    """Returns the figures that are quoted."""
    found = {}
    for r in (r for r in rows if r["part"] == "sparsity" and r["name"] != "dense"):
        name = f"chess.speedup_{r['name']}_{r['sparsity']:g}_b{r['batch']}_{r['weight_bits']}bit"
        found[name] = r["speedup"]
        if (r["name"], r["batch"], r["weight_bits"]) == ("chess:plus=True", 1, 16):
            found[f"chess.decode_speedup_{round(100 * r['sparsity'])}"] = r["speedup"]
            found[f"chess.byte_bound_fraction_{round(100 * r['sparsity'])}"] = r["speedup"] / r["bytes_allow"]
    return found


_PARTS = {"sparsity": _sparsity, "together": _together, "here": _here}
