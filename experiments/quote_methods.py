"""Writes the figures of the pages of methods from stored results, see `quote`."""

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping

from experiments import provenance, results

__all__ = ["A2ATS", "CHELSEA", "GEMMA", "PROSE", "QWEN", "below"]

_SPEED = """
    tokens a second where memory is equal, 8 full rows of 32,768, 8B | | 4.5 | equal_memory_throughput
    clustering a prompt of 32,768 tokens, of its prefill, 8B | % | 2% | cluster_share_of_prefill
    clustering, of decode time, the worst case | % | 5% | cluster_share_of_decode
    most bytes of a state, a prompt of 131,072 in chunks, of full's, 8B | % | 30% | streaming_peak_kv_fraction
    slope of full's step over the context, beside Chelsea's | | 5 | line_slope_ratio
    a step off the straight line, at most | % | | line_deviation
"""

GEMMA, QWEN = "--model gemma3-270m", "--model qwen2.5-coder-1.5b"
_QWEN_PROSE = f"{QWEN} --dtype float32 --docs 3 --calibration 2 --context 4096 --rest 128 --keeps"
PROSE = "--texts moby-dick.txt pydoc_data.topics"


def _chelsea_quality(options: str) -> str:
    """Returns each method's figures at each share of the slots.

    options: what the command begins with.
    """
    stored, path = results.newest("chelsea", f" quality {options}", "chelsea_quality")
    lines = [
        "| slots kept | method | KL to full | top-1 | perplexity | keys in filler | keys in a novel |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {r['keep']:.0%} | {r['name']} | {_scores(r)} |" for r in _by_share(stored["rows"], "keep")]
    return "\n".join(lines) + below(stored, path)


def _chelsea_sweep(options: str) -> str:
    """Returns the KL of each setting beside that of the ones it was tried beside.

    options: what the command begins with.
    """
    stored, path = results.newest("chelsea", f" sweep {options}", "chelsea_sweep")
    lines = ["| setting | slots kept | KL to full | top-1 |", "|---|---|---|---|"]
    lines += [
        f"| {r['setting'] or 'none'} | {r['keep']:.0%} | {r['kl']:.4f} | {r['top1']:.1%} |"
        for r in stored["rows"]
    ]
    return "\n".join(lines) + below(stored, path)


def _chelsea_long() -> str:
    """Returns what each method loses on a long text that is read token by token."""
    stored, path = results.newest("chelsea", " long", "chelsea_long")
    lines = ["| method | slots | KL to full | top-1 |", "|---|---|---|---|"]
    lines += [f"| {r['name']} | {r['budget']} | {r['kl']:.4f} | {r['top1']:.1%} |" for r in stored["rows"]]
    return "\n".join(lines) + below(stored, path)


def _chelsea_speed(options: str, device: str) -> str:
    """Returns the decode steps: times, what the bytes allow, and the share of clustering.

    options: what the command begins with. device: what its name begins with.
    """
    stored, path = results.newest("chelsea", f" speed {options}", "chelsea_speed", part="line", device=device)
    lines = [
        "| rows x tokens | budgets | step, µs | of the limit | clustering | times as fast | bytes allow |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in (r for r in stored["rows"] if r["part"] == "decode"):
        shape, share = r["spec"].replace(" bfloat16", ""), max(0, r["cluster_share"])
        ratios = (f"{r[k]:.2f}" if k in r else "" for k in ("speedup", "byte_ratio"))
        lines.append(
            f"| {shape}, {r['rows']} x {r['slots']:,} | {r['budgets']} | {r['step_us']:,.0f} "
            f"| {r['fraction']:.0%} | {share:.1%} | {' | '.join(ratios)} |"
        )
    lines += ["", "| figure | measured | wanted |", "|---|---|---|"]
    for row in _SPEED.strip().splitlines():
        words, how, wanted, claim = map(str.strip, row.split("|"))
        if f"chelsea.{claim}" in stored["claims"]:
            value = stored["claims"][f"chelsea.{claim}"]
            lines.append(f"| {words} | {f'{value:.1%}' if how == '%' else f'{value:.2f}'} | {wanted} |")
    picture = path.removesuffix(".json") + ".png"
    if (provenance.ROOT / picture).exists():
        lines += ["", f"![Decode steps over the context](../../{picture})"]
    return "\n".join(lines) + below(stored, path)


def _chelsea_requests() -> str:
    """Returns the times of prompts and their answers."""
    stored, path = results.newest("chelsea", " speed --prompt-rows", "chelsea_speed", part="end_to_end")
    lines = ["| method | rows | prompt, s | answer, s | times as fast |", "|---|---|---|---|---|"]
    for r in (r for r in stored["rows"] if r["part"] == "end_to_end"):
        scaled = f" (scaled from {r['prefill_rows']} rows)" if r["prefill_is_scaled"] else ""
        ratio = f"{r['speedup']:.2f}" if "speedup" in r else ""
        lines.append(
            f"| {r['name']} | {r['rows']} | {r['prefill_s']:.2f}{scaled} | {r['decode_s']:.2f} | {ratio} |"
        )
    return "\n".join(lines) + below(stored, path)


def _a2ats_hits(options: str) -> str:
    """Returns what steps read, and how much of it lies on the device with so many lines.

    options: what the command begins with.
    """
    stored, path = results.newest("a2ats", f" hits --calibration books {options}", "a2ats_hits")
    lines = [
        "| chosen by a query head | read by a KV head | of it, lines | tokens on the device | found there "
        "| in blocks of 16 |",
        "|---|---|---|---|---|---|",
    ]
    steps = {r["ratio"]: r["step_tokens"] for r in stored["rows"] if "hot" not in r}
    blocks = {(r["ratio"], r["hot"]): r["hit_rate"] for r in stored["rows"] if r.get("block", 1) > 1}
    for r in (r for r in stored["rows"] if r.get("block") == 1):
        ratio, hot = r["ratio"], r["hot"]
        lines.append(
            f"| {ratio:.1%} | {steps[ratio]:,.0f} tokens | {hot:g}x | {r['share_held']:.0%} "
            f"| {r['hit_rate']:.1%} | {blocks[ratio, hot]:.1%} |"
        )
    return "\n".join(lines) + below(stored, path)


def _a2ats_recall(options: str) -> str:
    """Returns how well each way ranks, mean over the layers that were measured.

    options: what the command begins with.
    """
    stored, path = results.newest("a2ats", f" recall {options}", "a2ats_recall")
    ratios = list(dict.fromkeys(r["ratio"] for r in stored["rows"]))
    n_layers = len({r["layer"] for r in stored["rows"]})
    heads = [f"top {ratio:.1%}" for ratio in ratios]
    lines = [f"| {n_layers} layers | {' | '.join(heads)} | attention at {ratios[1]:.0%} | read |"]
    lines.append("|---" * (len(ratios) + 3) + "|")
    for way in (k for k, x in stored["rows"][0].items() if isinstance(x, dict) and "recall" in x):
        mean = {
            (ratio, figure): statistics.mean(r[way][figure] for r in stored["rows"] if r["ratio"] == ratio)
            for ratio in ratios
            for figure in ("recall", "mass_union", "read")
        }
        cells = [f"{mean[ratio, 'recall']:.0%}" for ratio in ratios]
        cells += [f"{mean[ratios[1], 'mass_union']:.1%}", f"{mean[ratios[1], 'read']:.1%}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + below(stored, path)


def _a2ats_speed() -> str:
    """Returns steps of the largest batches with the full cache, and with K and V on the host."""
    stored, path = results.newest("a2ats", " speed --bits 8", "a2ats_speed", part="prefill")
    lines = [
        "| context | full cache | K and V on the host | tokens per second | found on the device |",
        "|---|---|---|---|---|",
    ]
    rows = [r for r in stored["rows"] if r["part"] == "decode"]
    for full, host in itertools.pairwise(rows):
        if full["name"] == "full":
            each = (f"{_rows(r['rows'])}, {r['step_us']:,.0f} µs" for r in (full, host))
            cells = (
                f"{full['slots']:,} tokens",
                *each,
                f"{host['tokens_per_s'] / full['tokens_per_s']:.2f} times",
                f"{host['hit_rate']:.1%}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + below(stored, path)


def _rows(n: int) -> str:
    return "1 row" if n == 1 else f"{n} rows"


def _a2ats_reads() -> str:
    """Returns what a place of host memory takes, by how far places spread and how many bytes each has."""
    stored, path = results.newest("a2ats", " reads", "a2ats_reads")
    found = {(r["gib"], r["place_bytes"]): r["place_ns"] for r in stored["rows"] if r["order"] == "drawn"}
    spreads, sizes = (list(dict.fromkeys(x)) for x in zip(*found, strict=True))
    lines = [
        f"| ns a place, within | {' | '.join(f'{n} bytes' for n in sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    lines += [f"| {g:g} GiB | {' | '.join(f'{found[g, n]:.1f}' for n in sizes)} |" for g in spreads]
    return "\n".join(lines) + below(stored, path)


def _a2ats_distances(options: str) -> str:
    """Returns what ranking by one distance finds, mean over layers.

    options: what the command begins with.
    """
    stored, path = results.newest("a2ats", f" distances {options}", "a2ats_distances")
    ratios = list(dict.fromkeys(r["ratio"] for r in stored["rows"]))
    heads = " | ".join(f"top {ratio:.1%}" for ratio in ratios)
    lines = [f"| all ranked at | {heads} | attention at {ratios[1]:.0%} |", "|---" * (len(ratios) + 2) + "|"]
    for far in dict.fromkeys(r["far"] for r in stored["rows"]):
        own = [r for r in stored["rows"] if r["far"] == far]
        mean = {
            (ratio, figure): statistics.mean(r[figure] for r in own if r["ratio"] == ratio)
            for ratio in ratios
            for figure in ("recall", "mass_union")
        }
        cells = [f"{mean[ratio, 'recall']:.0%}" for ratio in ratios] + [
            f"{mean[ratios[1], 'mass_union']:.1%}"
        ]
        lines.append(f"| {'their distances' if far is None else f'{far:,} tokens'} | {' | '.join(cells)} |")
    return "\n".join(lines) + below(stored, path)


def _a2ats_quality(options: str) -> str:
    """Returns what A²ATS loses, and what others lose that read as many bytes.

    options: what the command begins with.
    """
    stored, path = results.newest("a2ats", f" quality {options}", "a2ats_quality")
    lines = [
        "| chosen | method | bytes read | KL | top-1 | perplexity | keys in filler | keys in a novel |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['ratio']:.1%} | {r['name']} | {r['read']:.1%} | {_scores(r)} |"
        for r in _by_share(stored["rows"], "ratio")
    ]
    return "\n".join(lines) + below(stored, path)


def _by_share(rows: list[Mapping], share: str) -> list[Mapping]:
    """Returns the full cache's row, and then those of each share, the least first."""
    return sorted(rows, key=lambda r: r[share] % 1)


def _scores(r: Mapping) -> str:
    """Returns the cells of what a row's method loses and finds."""
    keys = (f"{r[f'passkey_{where}']} of {r[f'passkey_{where}_of']}" for where in ("filler", "novel"))
    return f"{r['kl']:.4f} | {r['top1']:.1%} | {r['perplexity']:.2f} | {' | '.join(keys)}"


def below(stored: dict, path: str) -> str:
    """Says under a table of docs/methods which command made it."""
    return (
        f"\n\n(`{stored['command']}` of {stored['commit'][:7]}, {stored['device']}: [{path}](../../{path}))\n"
    )


CHELSEA: Mapping[str, Callable[[], str]] = {
    "quality": functools.partial(_chelsea_quality, f"{PROSE} --keeps 0.2 0.25"),
    "quality at half": functools.partial(_chelsea_quality, f"{PROSE} --keeps 0.5 0.1"),
    "quality at a tenth": functools.partial(_chelsea_quality, f"{PROSE} --keeps 0.1"),
    "quality of Gemma": functools.partial(_chelsea_quality, "--model gemma3-270m --texts"),
    "quality of Gemma at half": functools.partial(_chelsea_quality, "--model gemma3-270m --dtype"),
    "quality of Qwen": functools.partial(_chelsea_quality, f"{QWEN} --dtype float32 --texts"),
    "quality of Qwen in prose": functools.partial(_chelsea_quality, f"{_QWEN_PROSE} 0.2"),
    "quality of Qwen in prose at a tenth": functools.partial(_chelsea_quality, f"{_QWEN_PROSE} 0.1"),
    "sweep": functools.partial(_chelsea_sweep, f"{PROSE} --keeps 0.2 --calibrated"),
    "sweep of passes": functools.partial(_chelsea_sweep, f"{PROSE} --keeps 0.2 --settings rounds=8"),
    "sweep of equal budgets": functools.partial(_chelsea_sweep, "--dtype float32"),
    "recent": functools.partial(_chelsea_sweep, f"{PROSE} --docs 4"),
    "recent with a table": functools.partial(_chelsea_quality, f"{PROSE} --docs 4"),
    "recent of Gemma": functools.partial(_chelsea_sweep, "--model gemma3-270m"),
    "long": _chelsea_long,
    "speed": functools.partial(_chelsea_speed, "--cases llama-3.1-8b", "NVIDIA H100"),
    "speed of an H200": functools.partial(_chelsea_speed, "--cases llama-3.1-8b", "NVIDIA H200"),
    "requests": _chelsea_requests,
}
A2ATS: Mapping[str, Callable[[], str]] = {
    "quality": functools.partial(_a2ats_quality, "--calibration books --dtype"),
    "quality of Gemma": functools.partial(_a2ats_quality, f"--calibration books-gemma {GEMMA}"),
    "quality of Qwen": functools.partial(_a2ats_quality, f"--calibration books-qwen {QWEN}"),
    "distances": functools.partial(_a2ats_distances, "--dtype float32"),
    "recall": functools.partial(_a2ats_recall, "--dtype"),
    "recall of Gemma": functools.partial(_a2ats_recall, GEMMA),
    "recall of Qwen": functools.partial(_a2ats_recall, QWEN),
    "hits": functools.partial(_a2ats_hits, "--dtype"),
    "hits of Gemma": functools.partial(_a2ats_hits, GEMMA),
    "hits of Qwen": functools.partial(_a2ats_hits, QWEN),
    "speed": _a2ats_speed,
    "reads": _a2ats_reads,
}
