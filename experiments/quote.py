"""Writes the README's figures from stored results, so that no number is typed by hand.

usage: python -m experiments.quote
"""

from pathlib import Path

from experiments import results

__all__ = ["main", "quoted"]

_BUDGET = 0.25
_README = Path(__file__).parent.parent / "README.md"


def quoted(text: str) -> str:
    """Returns the text with everything between `<!-- NAME -->` and `<!-- end -->` made anew.

    Raises:
        ValueError: where a marker is missing.
    """
    for name, block in {"compare": _compare(), "peers": _peers()}.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (mark and end):
            raise ValueError(f"README.md marks figures by <!-- {name} --> and <!-- end -->, got none: add them")
        text = before + mark + block + end + after
    return text


def _newest(experiment: str, command: str) -> results.Results:
    """Returns the newest stored run of a command."""
    found = [results.load(path) for path in sorted((results.FOLDER / experiment).glob("*.json"))]
    return max((r for r in found if r.header["command"] == command), key=lambda r: r.header["date"])


def _source(stored: results.Results) -> str:
    h = stored.header
    return (
        f"{h['device']}, jax {h['versions']['jax']}, {h['date'][:10]}, "
        f"[{stored.path.name}](experiments/results/{stored.path.parent.name}/{stored.path.name})"
    )


def _compare() -> str:
    """Returns the table at a quarter of the tokens, and storage at its own size."""
    stored = _newest("compare", "python -m experiments.compare")
    rows = {(r["name"], r["ratio"], r["question"]): r for r in stored.rows}
    lines = [
        "| method | tokens kept | perplexity | KL to full | pass keys, question unseen / seen | held | read |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, ratio, question), r in rows.items():
        if question == "seen" or ratio not in (1.0, _BUDGET):
            continue
        seen = rows.get((name, ratio, "seen"), r)["passkey"]
        kept = f"{ratio:.0%}" if r["held"] < 1 else "100%"
        lines.append(
            f"| {name} | {kept} | {r['perplexity']:.2f} | {r['kl']:.4f} | {r['passkey']} / {seen} of 5 "
            f"| {r['held']:.0%} | {r['read']:.0%} |"
        )
    return "\n".join(lines) + f"\n\n({_source(stored)})\n"


def _peers() -> str:
    """Returns the ratios to transformers on torch."""
    stored = _newest("peers", "python -m experiments.peers")
    c = stored.claims
    return (
        f"Prefill of 2,048 tokens is {c['prefill_speedup']:.2f} times and decode {c['decode_speedup']:.2f} times as "
        f"fast as transformers on torch, float32, medians of alternating runs ({_source(stored)}).\n"
    )


def main() -> None:
    """Rewrites README.md."""
    _README.write_text(quoted(_README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
