"""Times Chelsea against the full cache, in one run and with random weights of published shapes.

    decode       a step of each: plain, and with its share of the clusterings over whole periods
    line         a plain step against the length of the context
    throughput   tokens per second of all rows that one KV memory holds
    end_to_end   a long prompt and its answer
    cluster      the clustering at a prompt's end, as a share of the prefill
    streaming    the largest state while a prompt is clustered chunk by chunk

Caches hold random tokens, see `chelsea_steps`. The floor is the time that reading the weights and the
occupied slots once takes at the copy rate measured by the same process; a slot is its key, value, position
and mass.
"""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import chelsea_plot, options, plot, results
from experiments.cases import Case, case_of, fitting, prompts, random_model
from experiments.chelsea_cases import Speed, budget, chelsea
from experiments.chelsea_prompts import clustering, serve, served, streamed
from experiments.chelsea_steps import timed
from experiments.results import Results
from kvjax.methods.full import Full

__all__ = ["Speed", "speed"]


def speed(settings: Speed) -> int:
    """Measures what is not stored yet, prints a line for each row, and returns 0.

    Raises:
        ValueError: for an unknown part, a case that is none, a period that is not at least two calls, or a
            budget that Chelsea refuses.
        RuntimeError: where what was timed went wrong, or even three quarters of a batch do not fit.
    """
    if unknown := sorted(set(settings.parts) - _PARTS.keys()):
        raise ValueError(f"a part is one of {', '.join(_PARTS)}, got {', '.join(unknown)}")
    one = (settings.throughput, settings.end_to_end, settings.cluster, settings.streaming)
    for word in (*settings.cases, *settings.line, *one):
        case_of(word)  # a wrong one is told before anything is measured
    if settings.slack % settings.steps or settings.slack < 2 * settings.steps:
        raise ValueError(
            "a period of slack steps is two or more whole calls, got "
            f"{settings.slack=} and {settings.steps=}: lower steps"
        )
    words = ["python -m experiments.chelsea speed"]
    words += map(shlex.quote, options.as_arguments(settings, skip=("out", "parts")))
    stored = results.start("chelsea_speed", settings.seed, None, settings.out, " ".join(words))
    for name in settings.parts:
        stored = _PARTS[name](settings, stored)
    random_model.cache_clear()
    print(stored.path)
    return 0


def _decode(settings: Speed, stored: Results) -> Results:
    """Times the decode steps of every case: full, and Chelsea with uniform and with ragged budgets."""
    found: dict[str, list[dict]] = {"uniform": [], "ragged": []}
    for case in map(case_of, settings.cases):
        stored, base = _timed_once(settings, stored, case, "full")
        for budgets, rows in found.items():
            stored, row = _timed_once(settings, stored, case, budgets, base)
            rows.append(row)
            name = "decode_speedup" if budgets == "uniform" else f"decode_speedup_{budgets}"
            stored = stored.claim({f"chelsea.{name}_{case.label}": row["speedup"]})
    rows = found["uniform"] + found["ragged"]
    return stored.claim(
        {
            "chelsea.byte_limit_fraction_min": min(row["fraction"] for row in rows),
            "chelsea.speedup_over_byte_ratio_min": min(row["speedup"] / row["byte_ratio"] for row in rows),
            "chelsea.cluster_share_of_decode": max(row["cluster_share"] for row in rows),
        }
    )


def _line(settings: Speed, stored: Results) -> Results:
    """Fits lines to the plain steps at several lengths, and draws them.

    Raises:
        ValueError: for less than two lengths, or cases of several shapes or batches.
    """
    cases = sorted(map(case_of, settings.line), key=lambda case: case.tokens)
    if len({case.tokens for case in cases}) < 2 or len({(c.shape, c.layers, c.batch) for c in cases}) > 1:
        raise ValueError(f"a line has one shape and batch at two lengths or more, got {settings.line}")
    steps: dict[str, list[float]] = {"full": [], "chelsea": []}
    for case in cases:
        stored, base = _timed_once(settings, stored, case, "full")
        stored, row = _timed_once(settings, stored, case, "uniform", base)
        steps["full"].append(base["step_us"])
        steps["chelsea"].append(row["step_us"])
    tokens = [case.tokens for case in cases]
    fits = {name: _fit(tokens, step) for name, step in steps.items()}
    values = {"tokens": tokens, "slope_ratio": fits["full"][0] / fits["chelsea"][0]}
    for name, (slope, start, deviation) in fits.items():
        values |= {
            f"{name}_us": steps[name], f"{name}_us_per_1k": 1024 * slope, f"{name}_start_us": start,
            f"{name}_deviation": deviation,
        }  # fmt: skip
    wanted = cases[0].row("line", "fit") | {"slots": "all"}
    if stored.find(wanted) is None:
        stored = stored.add(wanted, values)
    deviation = max(fit[2] for fit in fits.values())
    chelsea_plot.draw_line(values, f"{cases[0].shape}, batch {cases[0].batch}", plot.path_of(stored.path))
    print(f"line: slopes {values['slope_ratio']:.2f} to 1, {100 * deviation:.1f}% off the lines at most")
    return stored.claim(
        {"chelsea.line_slope_ratio": values["slope_ratio"], "chelsea.line_deviation": deviation}
    )


def _fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Returns slope and start of the least-squares line, and the largest relative deviation from it."""
    slope, start = np.polyfit(x, y, 1)
    line = slope * np.asarray(x) + start
    return float(slope), float(start), float(np.abs(np.asarray(y) / line - 1).max())


def _throughput(settings: Speed, stored: Results) -> Results:
    """Compares tokens per second where Chelsea's slots take no more memory than the full cache's."""
    case = case_of(settings.throughput)
    stored, base = _timed_once(settings, stored, case, "full")
    batch = base["rows"] * case.tokens // budget(settings, case.tokens)
    stored, row = _timed_once(settings, stored, dataclasses.replace(case, batch=batch), "uniform")
    values = {
        "full_rows": base["rows"], "chelsea_rows": row["rows"], "chelsea_rows_at_equal_memory": batch,
        "full_kv_bytes": base["state_bytes"], "chelsea_kv_bytes": row["state_bytes"],
        "full_tokens_per_s": base["rows"] / base["amortised_us"] * 1e6,
        "chelsea_tokens_per_s": row["rows"] / row["amortised_us"] * 1e6,
    }  # fmt: skip
    values["ratio"] = values["chelsea_tokens_per_s"] / values["full_tokens_per_s"]
    wanted = case.row("throughput", "equal memory")
    if stored.find(wanted) is None:
        stored = stored.add(wanted, values)
    print(
        f"throughput {case.label}: {values['full_tokens_per_s']:.0f} tokens/s of {base['rows']} rows, "
        f"{values['chelsea_tokens_per_s']:.0f} of {row['rows']} clustered ones: {values['ratio']:.2f} times"
    )
    return stored.claim({"chelsea.equal_memory_throughput": values["ratio"]})


def _end_to_end(settings: Speed, stored: Results) -> Results:
    """Times prompts and their answers with the full cache and with Chelsea."""
    case = case_of(settings.end_to_end)
    found: dict[str, dict] = {}
    for name in ("full", "chelsea"):
        wanted = case.row("end_to_end", name)
        if stored.find(wanted) is None:
            model, base = case.model(settings.seed), found.get("full")
            method = Full() if name == "full" else chelsea(settings, case.tokens)
            run = functools.partial(served, model, method, case.tokens, settings=settings)
            rows, values = (base["rows"], run(base["rows"])) if base else fitting(case.batch, run)
            if base:
                values["speedup"] = base["total_s"] / values["total_s"]
            stored = stored.add(wanted, {"rows": rows, **values})
        row = found[name] = stored.find(wanted)
        scaled = f" (scaled from {row['prefill_rows']} rows)" if row["prefill_is_scaled"] else ""
        print(
            f"end to end {case.label} {name}: {row['rows']} rows, prefill {row['prefill_s']:.2f} s{scaled}, "
            f"{settings.new} steps {row['decode_s']:.2f} s"
            + (f", {row['speedup']:.2f} times as fast" if name == "chelsea" else "")
        )
    return stored.claim({"chelsea.end_to_end_speedup": found["chelsea"]["speedup"]})


def _cluster(settings: Speed, stored: Results) -> Results:
    """Times the clustering at the end of a prompt, and the whole prefill that it is part of."""
    case = case_of(settings.cluster)
    wanted = case.row("cluster", "chelsea")
    if stored.find(wanted) is None:
        model, method = case.model(settings.seed), chelsea(settings, case.tokens)
        cluster_s = clustering(model, method, case, settings)
        ids = prompts(model, case.batch, case.tokens, settings.seed)
        one = dataclasses.replace(settings, new=0, compress="end")
        prefill_s = [serve(model, method, ids, one)[0] for _ in range(2)][-1]  # the first one compiles
        values = {"cluster_s": cluster_s, "prefill_s": prefill_s, "share": cluster_s / prefill_s}
        stored = stored.add(wanted, values)
    row = stored.find(wanted)
    print(
        f"cluster {case.label}: {1e3 * row['cluster_s']:.1f} ms of {row['prefill_s']:.2f} s of prefill, "
        f"{100 * row['share']:.1f}%"
    )
    return stored.claim({"chelsea.cluster_share_of_prefill": row["share"]})


def _streaming(settings: Speed, stored: Results) -> Results:
    """Reads prompts that are clustered chunk by chunk, and finds the most bytes that the state takes."""
    case = case_of(settings.streaming)
    wanted = case.row("streaming", "chelsea")
    if stored.find(wanted) is None:
        stored = stored.add(wanted, streamed(case, settings))
    row = stored.find(wanted)
    device = "" if row["device_fraction"] is None else f"; with all else {row['device_fraction']:.3f}"
    print(f"streaming {case.label}: at most {row['fraction']:.3f} of the full cache's bytes{device}")
    return stored.claim({"chelsea.streaming_peak_kv_fraction": row["fraction"]})


def _timed_once(
    settings: Speed, stored: Results, case: Case, budgets: str, base: Mapping[str, Any] | None = None
) -> tuple[Results, dict]:
    """Returns the row of a decode step, which it measures where it is not stored, and prints it.

    Args:
        budgets: "full", or Chelsea's: "uniform" or "ragged".
        base: the full cache's row, which gives the batch and what to compare with.
    """
    wanted = case.row("decode", "full" if budgets == "full" else "chelsea", budgets=budgets)
    if stored.find(wanted) is None:
        model, method = case.model(settings.seed), Full()
        if budgets != "full":
            method = chelsea(settings, case.tokens, model if budgets == "ragged" else None)
        run = functools.partial(timed, model, method, case.tokens, settings=settings)
        rows, values = (base["rows"], run(base["rows"])) if base else fitting(case.batch, run)
        if base:
            values["speedup"] = base["step_us"] / values["amortised_us"]
            values["byte_ratio"] = base["bytes"] / values["bytes"]
        stored = stored.add(wanted, {"rows": rows, **values})
    row = stored.find(wanted)
    print(
        f"decode {case.label} {budgets}: {row['rows']} rows, {row['step_us']:.0f} us a step, "
        f"{row['fraction']:.2f} of the byte limit's rate"
        + ("" if budgets == "full" else f", {row['amortised_us']:.0f} us with clustering")
        + (f", {row['speedup']:.2f} times as fast ({row['byte_ratio']:.2f} by bytes)" if base else "")
    )
    return stored, row


_PARTS: Mapping[str, Callable[[Speed, Results], Results]] = {
    "decode": _decode, "line": _line, "throughput": _throughput, "end_to_end": _end_to_end,
    "cluster": _cluster, "streaming": _streaming,
}  # fmt: skip
