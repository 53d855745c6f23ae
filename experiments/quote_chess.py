"""Writes the figures of the page of CHESS from stored results, see `quote`."""

import functools
from collections.abc import Callable, Mapping

from experiments import results
from experiments.quote_methods import GEMMA, QWEN, below

__all__ = ["CHESS"]

_PATTERN = "--pattern experiments/results/chess_quality/cpu-2026-11-26.json"


def _chess_quality(options: str) -> str:
    """Returns what methods of activation sparsity lose at equal sparsity.

    options: all of the command's.
    """
    stored, path = results.newest("chess", f" quality {options}", "chess_quality", whole=True)
    lines = [
        "| asked | method | thresholds | measured | by layer and site | KL to dense | top-1 | perplexity "
        "| FFN error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(stored["rows"], key=lambda r: r["sparsity_asked"]):
        cells = [f"{r['sparsity_asked']:.0%}", r["name"], r["form"], *[""] * 2]
        if "sites" in r:
            shares = [x for site in r["sites"].values() for x in site]
            cells[3:] = f"{r['sparsity']:.1%}", f"{min(shares):.0%} .. {max(shares):.0%}"
        error = f"{r['ffn_error']:.3f}" if "ffn_error" in r else ""
        cells += f"{r['kl']:.4f}", f"{r['top1']:.1%}", f"{r['perplexity']:.2f}", error
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + below(stored, path)


def _chess_together() -> str:
    """Returns what activation sparsity and cache methods lose, alone and together."""
    stored, path = results.newest("chess", " together", "chess_together")
    caches = list(dict.fromkeys(r["cache"] for r in stored["rows"]))
    kl = {(r["name"], r["cache"]): r["kl"] for r in stored["rows"]}
    lines = [
        f"| KL to dense | {' | '.join(c.partition(':')[0] for c in caches)} |",
        "|---" * (len(caches) + 1) + "|",
    ]
    names = dict.fromkeys(r["name"] for r in stored["rows"])
    lines += [f"| {name} | {' | '.join(f'{kl[name, c]:.4f}' for c in caches)} |" for name in names]
    return "\n".join(lines) + below(stored, path)


def _chess_speed(part: str, options: str, whole: bool = False) -> str:
    """Returns decode steps: times, what the bytes allow, and how many activations were 0.

    options: what the command begins with after the pattern, or all of them.
    """
    stored, path = results.newest("chess", f" speed {_PATTERN}{options}", "chess_speed", part, whole)
    lines = [
        "| rows | cache | weights | method | sparsity | zeros by site | step, µs | of limit | times as fast "
        "| bytes allow |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in (r for r in stored["rows"] if r["part"] == part):
        zeros = ", ".join(f"{site.lower()} {x:.0%}" for site, x in r["zeros"].items())
        cache = f"{r['slots']:,}, {r.get('cache', 'full').partition(':')[0]}"
        weights = f"{r.get('weight_bits', 16)} bits"
        lines.append(
            f"| {r['batch']} | {cache} | {weights} | {r['name']} | {r['sparsity']:.0%} | {zeros} "
            f"| {r['step_us']:,.0f} | {r['fraction']:.0%} | {r['speedup']:.2f} | {r['bytes_allow']:.2f} |"
        )
    return "\n".join(lines) + below(stored, path)


CHESS: Mapping[str, Callable[[], str]] = {
    "quality": functools.partial(
        _chess_quality,
        "--dtype float32 --learned moby-dick.txt --methods chess chess:plus=True cats teal "
        "--sparsities 0.5 0.7 0.3 0.4 0.6 --refine 40",
    ),
    "quality of Gemma": functools.partial(
        _chess_quality,
        f"{GEMMA} --dtype float32 --learned moby-dick.txt --docs 4 --tokens 32768 "
        "--methods chess chess:plus=True cats teal --sparsities 0.5 0.7 0.3 0.4 0.6 --refine 40",
    ),
    "quality of Qwen": functools.partial(
        _chess_quality,
        f"{QWEN} --dtype float32 --learned moby-dick.txt --methods chess cats teal chess:plus=True "
        "--sparsities 0.5 0.7 0.3 --refine 40",
    ),
    "quality of Qwen between": functools.partial(
        _chess_quality,
        f"{QWEN} --dtype float32 --learned moby-dick.txt --methods chess chess:plus=True cats teal "
        "--sparsities 0.6 0.4 --refine 40",
    ),
    "settings": functools.partial(
        _chess_quality,
        "--learned moby-dick.txt --docs 4 --tokens 16384 --methods chess chess:plus=True cats teal "
        "chess:statistic=rms chess:group=8 chess:group=128 --sparsities 0.5",
    ),
    "together": _chess_together,
    "speed": functools.partial(_chess_speed, "sparsity", " --samples 5", True),
    "speed of batches": functools.partial(_chess_speed, "sparsity", " --methods chess:plus=True --samples 5"),
    "speed together": functools.partial(_chess_speed, "together", " --sparsities 0.5"),
}
