"""Writes the figures of the README and of docs from stored results, so that no number is typed by hand.

usage: python -m experiments.quote
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments import provenance, quote_chess, quote_leoam, quote_methods, quote_systems, results

__all__ = ["files", "main", "quoted"]

_BUDGET = 0.25
_KERNELS = """
    decode attention, K and V over 256 MiB, of the copy rate | % | 95% | decode_attention.copy_fraction_min
    from 64 to 256 MiB, of the copy rate | % | 80% | decode_attention.copy_fraction_64mb_min
    beside cuDNN | x | 1.00x | decode_attention.vs_cudnn_min
    beside JAX's own Pallas op | x | 2.50x | decode_attention.vs_jax_op_min
    largest head 5 times the mean, time beside equal heads | | 1.10 | decode_attention.ragged_time_ratio
    int8 codes, time beside bfloat16 | | 0.56 | decode_attention.int8_time_ratio
    int4 codes, time beside bfloat16 | | 0.32 | decode_attention.int4_time_ratio
    blocks of 16 by index, of the copy rate | % | 75% | sparse_decode_attention.block_fraction
    single tokens by index, of the copy rate | % | 45% | sparse_decode_attention.token_fraction
    blocks from pinned host memory, of the link's rate | % | 80% | sparse_decode_attention.host_block_fraction
    tokens from pinned host memory, of the link's rate | % | 70% | sparse_decode_attention.host_token_fraction
    chunked similarity, time beside reading K | | 1.40 | chunked_similarity.vs_read_k
    scores by codebook beside q·K, 131,072 slots | x | 10.00x | vq_scores.vs_exact
    2,048 of 131,072 beside `lax.top_k`, 64 rows | x | 8.00x | select_topk.vs_lax
    sparse products beside dense, 50% zeros | x | 1.70x | sparse_matvec.speedup_50
    sparse products beside dense, 70% zeros | x | 2.60x | sparse_matvec.speedup_70
    without zeros, time beside dense | | 1.05 | sparse_matvec.time_ratio_0
"""  # case, how its figure is written, what was wanted, claim
_GPUS = ("NVIDIA H100", "NVIDIA H200")  # what names of devices begin with
_PEERS = {"cudnn": "cuDNN", "jax_op": "JAX's op", "exact": "q·K"}


def files() -> dict[Path, dict[str, Callable[[], str]]]:
    """Returns the files that quote results, and what makes each of their blocks."""
    return {
        provenance.ROOT / "README.md": {
            "compare": _compare,
            "peers": _peers,
            "kernels": _kernels,
            "systems": quote_systems.table,
        },
        provenance.ROOT / "docs" / "kernel_log.md": {
            f"every kernel, {name.split()[-1]}": functools.partial(_every_kernel, name) for name in _GPUS
        },
        provenance.ROOT / "docs" / "methods" / "chelsea.md": quote_methods.CHELSEA,
        provenance.ROOT / "docs" / "methods" / "a2ats.md": quote_methods.A2ATS,
        provenance.ROOT / "docs" / "methods" / "chess.md": quote_chess.CHESS,
        provenance.ROOT / "docs" / "methods" / "leoam.md": quote_leoam.LEOAM,
    }


def quoted(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Returns the text with everything between `<!-- NAME -->` and `<!-- end -->` made anew.

    Raises:
        ValueError: where a marker is missing.
    """
    for name, block in blocks.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (mark and end):
            raise ValueError(f"a file marks figures by <!-- {name} --> and <!-- end -->, got none: add them")
        text = before + mark + block() + end + after
    return text


def _source(stored: dict, path: str) -> str:
    """Says where figures come from."""
    jax = stored["versions"].get("jax") or stored["rows"][0]["ready"]["kvjax"]["versions"]["jax"]
    return f"{stored['device']}, jax {jax}, {stored['date'][:10]}: [{path}]({path})"


def _compare() -> str:
    """Returns the table at a quarter of the tokens, storage at its own size, and the plot."""
    stored, path = results.newest("compare", whole=True)
    rows = {(r["name"], r["ratio"], r["question"]): r for r in stored["rows"]}
    lines = [
        "| method | budget | perplexity | KL to full | pass keys, unseen / seen | held | read |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, ratio, question), r in rows.items():
        if question == "seen" or ratio not in (1.0, _BUDGET):
            continue
        seen = rows.get((name, ratio, "seen"), r)["passkey"]
        lines.append(
            f"| {name} | {ratio:.0%} | {r['perplexity']:.2f} | {r['kl']:.4f} | {r['passkey']} / {seen} of 5 "
            f"| {r['held']:.0%} | {r['read']:.0%} |"
        )
    plot = f"![What each method loses for the bytes it saves]({path.removesuffix('.json')}.png)"
    return "\n".join(lines) + f"\n\n{plot}\n\n({_source(stored, path)})\n"


def _peers() -> str:
    """Returns the ratios to transformers on torch."""
    stored, path = results.newest("peers", whole=True)
    c = stored["claims"]
    return (
        f"Prefill of 2,048 tokens is {c['prefill_speedup']:.2f} times and decode {c['decode_speedup']:.2f} "
        f"times as fast\nas transformers on torch, float32, medians of alternating runs "
        f"({_source(stored, path)}).\n"
    )


def _kernels() -> str:
    """Returns the worst case of each figure of the kernels beside what was wanted, and the decode step."""
    runs = [results.newest("kernels", device=device) for device in _GPUS]
    lines = [
        "| the worst case of (x: times as fast) | H100 | H200 | wanted of an H100 |",
        "|---|---|---|---|",
    ]
    for row in _KERNELS.strip().splitlines():
        case, how, wanted, claim = map(str.strip, row.split("|"))
        values = [stored["claims"][claim] for stored, _ in runs]
        words = (f"{value:.0%}" if how == "%" else f"{value:.2f}{how}" for value in values)
        lines.append(f"| {case} | {' | '.join(words)} | {wanted} |")
    step, step_path = results.newest("decode", " speed", device=_GPUS[0])
    for words, case in (("batch 1 at 8k", "b1_8k"), ("batch 8 at 32k", "b8_32k")):
        value = step["claims"][f"full.fraction_{case}"]
        lines.append(f"| whole decode step of 8B, {words}, of the byte limit | {value:.0%} | | 85% |")
    sources = [f"{_source(stored, path)};" for stored, path in runs]
    sources.append(f"the step: [{step_path}]({step_path})")
    return "\n".join(lines) + "\n\n({})\n".format("\n".join(sources))


def _every_kernel(device: str) -> str:
    """Returns a line for every case that was timed on a device."""
    stored, path = results.newest("kernels", device=device)
    cases: dict[tuple, list[dict]] = {}
    for r in stored["rows"]:
        cases.setdefault((r["name"], r["spec"]), []).append(r)
    lines = [
        "| op | case | MiB | floor, µs | measured, µs | floor / measured | times as fast as |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, spec), rows in cases.items():
        r = rows[0]
        peers = (f"{r['speedup']:.2f} {_PEERS.get(r['peer'], r['peer'])}" for r in rows if r["peer"])
        lines.append(
            f"| {name} | {spec} | {r['bytes'] / 2**20:,.0f} | {r['floor_us']:,.1f} | {r['time_us']:,.1f} "
            f"| {r['fraction']:.2f} | {', '.join(peers)} |"
        )
    return "\n".join(lines) + f"\n\n(`{stored['command']}` of {stored['commit'][:7]}: [{path}](../{path}))\n"


def main() -> None:
    """Rewrites the files."""
    for path, blocks in files().items():
        path.write_text(quoted(path.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
