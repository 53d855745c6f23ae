"""Writes the figures of the page of LeoAM from stored results, see `quote`."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from experiments import results
from experiments.quote_methods import GEMMA, QWEN, below

__all__ = ["LEOAM"]

_WAYS = (
    "leaf 8", "leaf 16", "leaf 32", "leaf 64", "2 pairs", "leaf 8, 8 bits", "1 point", "2 points",
    "leaf 8, 1 point", "leaf 8, 1 point, 8 bits", "leaf 8, 1 point, 4 bits", "1 middle", "leaf 8, 1 middle",
    "leaf 8, 1 middle, 8 bits", "leaf 8, 1 middle, 4 bits", "leaf 4, 1 middle, 4 bits", "true leaf 16",
    "true leaf 1",
)  # fmt: skip
_LONG = "--dtype float32 --docs 1 --context"
_NOVEL = "--dtype float32 --texts moby-dick.txt --docs 2 --rest 96"
_KINDS = f"{GEMMA} --dtype float32 --rest 128 --shares 0.1 0.2 --methods leoam"
_SHARES = (0.05, 0.1, 0.2)


def _recall(options: str) -> str:
    """Returns what abstracts catch, for the tokens and for the bytes that are read.

    options: all of the command's.
    """
    claims, model, ending = _claims(options)
    lines = [
        "| abstract | its bytes | all attention at 5, 10, 20% of tokens | outside window and sinks "
        "| all, at 20% of bytes | useless at 10% |",
        "|---|---|---|---|---|---|",
    ]
    for way in _WAYS:
        figure = lambda name, share: claims.get(f"{model}.{_short(way)}.{name}@{share:g}")  # noqa: B023, E731
        cells = [_percent([figure("abstracts", 0.1)])]
        cells += [_percent([figure(name, share) for share in _SHARES]) for name in ("mass_recall", "far")]
        cells += [_percent([figure("mass_at_bytes", 0.2)]), _percent([figure("useless", 0.1)])]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + ending


def _work(options: str) -> str:
    """Returns the chunks that trees evaluate, and how much of a choice is known before."""
    claims, model, ending = _claims(options)
    lines = ["| | 5% | 10% | 20% |", "|---|---|---|---|"]
    for root in (32, 64, 128, 256, 1024):
        found = (claims[f"{model}.descents.{root}.of_leaves@{share:g}"] for share in _SHARES)
        lines.append(
            f"| evaluations, roots of {root}, beside all leaves | {' | '.join(f'{x:.2f}' for x in found)} |"
        )
    found = (claims[f"{model}.descents.128.of_tokens@{share:g}"] for share in _SHARES)
    lines.append(f"| roots of 128, beside all tokens | {' | '.join(f'{x:.3f}' for x in found)} |")
    for way, words in (
        ("last_step", "chosen by the step before"),
        ("foreseen_query", "by the foreseen query"),
    ):
        found = (claims[f"{model}.predictions.{way}.hit@{share:g}"] for share in _SHARES)
        lines.append(f"| of a choice, {words} | {' | '.join(f'{x:.0%}' for x in found)} |")
    return "\n".join(lines) + ending


def _claims(options: str) -> tuple[Mapping[str, float], str, str]:
    stored, path = results.newest("leoam", f" recall {options}", "leoam_recall", whole=True)
    return stored["claims"], stored["rows"][0]["model"].split("-")[0], below(stored, path)


def _short(way: str) -> str:
    return way.replace(" ", "_").replace(",", "")


def _percent(values: list[float | None]) -> str:
    return ", ".join("" if x is None else f"{x:.1%}" if x < 0.1 else f"{x:.0%}" for x in values)


def _quality(options: str) -> str:
    """Returns what methods lose for the bytes that they read.

    options: what the command begins with.
    """
    stored, path = results.newest("leoam", f" quality {options}", "leoam_quality")
    lines = ["| asked | method | bytes read | KL | top-1 | perplexity |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['share']:.0%} | {r['name']} | {r['read']:.1%} | {r['kl']:.4f} | {r['top1']:.1%} "
        f"| {r['perplexity']:.2f} |"
        for r in stored["rows"]
    ]
    return "\n".join(lines) + below(stored, path)


def _speed(*options: str) -> str:
    """Returns steps of contexts on a disk, of a run each.

    options: what the commands begin with.
    """
    lines, endings = [
        "| shape, rows | | chosen again | step, ms | LeoAM's times as fast | found on the device "
        "| of the rest, on the host, read ahead | from disk, MiB | that at the disk's rate, ms "
        "| computing, disk, link |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ], []  # fmt: skip
    for words in options:
        stored, path = results.newest("leoam", f" speed {words}", "leoam_speed")
        rows = [r for r in stored["rows"] if r["part"] == "decode"]
        rate = next(r["disk_read"] for r in stored["rows"] if r["part"] == "bandwidths")
        own = {(r["spec"], r["batch"]): r["step_us"] for r in rows[::-1] if r["name"].startswith("leoam")}
        lines += [_step(r, own.get((r["spec"], r["batch"])), rate) for r in rows]
        endings.append(below(stored, path))
    return "\n".join(lines) + "".join(endings)


def _step(r: Mapping[str, Any], own_us: float | None, rate: float) -> str:
    """Returns a row of the table of steps.

    own_us: LeoAM's step, the first of its run. rate: of the disk, bytes per second.
    """
    chooses = r["name"].startswith(("leoam", "fixed"))
    found = (f"{r['hit_rate']:.1%}", f"{r['pooled']:.0%}, {r['expected']:.0%}") if chooses else ("", "")
    again = f"{r['overlap']:.0%}" if chooses and "overlap" in r else ""
    shares = ", ".join(f"{max(r[k], 0):.0%}" for k in ("computing", "disk", "link"))
    beside = f"{r['step_us'] / own_us:.2f}" if own_us else ""
    return (
        f"| {r['spec'].replace(' bfloat16', '')}, {r['batch']} | {r['name']} | {again} "
        f"| {r['step_us'] / 1e3:,.1f} "
        f"| {beside} | {found[0]} | {found[1]} "
        f"| {r['disk_bytes'] / 2**20:,.0f} | {r['disk_bytes'] / rate * 1e3:,.0f} | {shares} |"
    )


def _reads(model: str) -> str:
    """Returns what steps ask a disk for, by the tokens of a chunk.

    model: the command's options.
    """
    stored, path = results.newest("leoam", f" reads {model}", "leoam_reads", whole=True)
    lines = ["| leaf | chunk | chunks from disk | KiB | of 64's |", "|---|---|---|---|---|"]
    rows = [r for r in stored["rows"] if (r["device"], r["host"]) == (1.1, 0.1)]
    base = {r["name"]: r["disk_bytes"] for r in rows if r["chunk"] == 64}
    lines += [
        f"| {_leaf(r['name'])} | {r['chunk']} | {r['disk_chunks']:.2f} | {r['disk_bytes'] / 2**10:.1f} "
        f"| {r['disk_bytes'] / base[r['name']]:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + below(stored, path)


def _leaf(name: str) -> str:
    """Returns what a method's words say of its leaves."""
    return name.removeprefix("leoam:leaf=").replace(",known_by=", ", ")


def _faults() -> str:
    """Returns how many faults of each kind were tried and survived."""
    stored, path = results.newest("leoam", " faults", "leoam_faults")
    tried, survived = Counter(), Counter()
    for r in stored["rows"]:
        tried[r["fault"]] += 1
        survived[r["fault"]] += r["survived"]
    lines = ["| fault | tried | survived |", "|---|---|---|"]
    lines += [f"| {fault} | {n} | {survived[fault]} |" for fault, n in tried.items()]
    return "\n".join(lines) + below(stored, path)


LEOAM: Mapping[str, Callable[[], str]] = {
    "reads": functools.partial(_reads, "--dtype float32"),
    "reads of Gemma": functools.partial(_reads, f"{GEMMA} --dtype float32 --context 16128"),
    "reads of Qwen": functools.partial(_reads, f"{QWEN} --dtype float32 --context 8192"),
    "recall": functools.partial(_recall, f"{_LONG} 7168"),
    "recall of Gemma": functools.partial(_recall, f"{GEMMA} {_LONG} 16384"),
    "recall of Qwen": functools.partial(_recall, f"{QWEN} {_LONG} 8192"),
    "work": functools.partial(_work, f"{_LONG} 7168"),
    "work of Gemma": functools.partial(_work, f"{GEMMA} {_LONG} 16384"),
    "work of Qwen": functools.partial(_work, f"{QWEN} {_LONG} 8192"),
    "quality": functools.partial(_quality, f"{_NOVEL} --keys"),
    "quality of codes": functools.partial(_quality, f"{_NOVEL} --methods leoam leoam:leaf=8"),
    "quality beside A²ATS": functools.partial(
        _quality, "--dtype float32 --docs 2 --rest 96 --shares 0.1 0.2 --methods"
    ),
    "quality beside A²ATS at 5%": functools.partial(
        _quality, "--dtype float32 --docs 2 --rest 96 --shares 0.05 --methods"
    ),
    "quality of Gemma": functools.partial(_quality, f"{GEMMA} --dtype float32 --docs 2"),
    "quality of Gemma, abstracts": functools.partial(_quality, f"{_KINDS} leoam:known_by=mean"),
    "quality of Gemma, codes": functools.partial(_quality, f"{_KINDS} leoam:leaf=8"),
    "quality of Qwen beside A²ATS": functools.partial(
        _quality, f"{QWEN} --dtype float32 --docs 1 --rest 96 --shares 0.1 0.2 --methods leoam leoam"
    ),
    "quality of Qwen beside A²ATS at 5%": functools.partial(
        _quality, f"{QWEN} --dtype float32 --docs 1 --rest 96 --shares 0.05 --methods leoam leoam"
    ),
    "quality of Qwen": functools.partial(_quality, f"{QWEN} --dtype float32 --docs 1 --rest 96 --keys"),
    "speed": functools.partial(
        _speed,
        "--cases longchat-7b/16:4x32768 --names leoam fixed fixed-equal full",
        "--cases longchat-7b/8:8x32768 --names leoam fixed fixed-equal full",
        "--cases longchat-7b/4:8x32768 --names full leoam",
        "--cases llama-3.1-8b:4x32768 --names leoam",
        "--cases longchat-7b:1x32768 --names leoam",
    ),
    "speed with chunks of 64": functools.partial(
        _speed,
        "--samples 2",
        "--cases llama-3.1-8b:8x32768 --names full leoam-host",
        "--cases llama-3.1-8b:8x32768 --names full prefetch",
        "--cases longchat-7b:1x32768 --names full prefetch fixed leoam",
        "--cases longchat-7b/8:8x32768 --names full fixed leoam",
        "--cases llama-3.1-8b:4x32768 --names full fixed fixed-equal leoam",
        "--cases longchat-7b:1x32768 --names full fixed fixed-equal leoam",
        "--cases longchat-7b:4x32768 --names full fixed leoam",
    ),
    "faults": _faults,
}
