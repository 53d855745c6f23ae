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
            raise ValueError(
                f"README.md marks figures by <!-- {name} --> and <!-- end -->, got none: add them"
            )
        text = before + mark + block + end + after
    return text


def _newest(experiment: str) -> tuple[dict, str]:
    """Returns the newest stored run of an experiment with its defaults, and its file."""
    found = [(results.load(path), path) for path in (results.FOLDER / experiment).glob("*.json")]
    stored, path = max(
        ((run, path) for run, path in found if run["command"] == f"python -m experiments.{experiment}"),
        key=lambda pair: pair[0]["date"],
    )
    return stored, path.relative_to(_README.parent).as_posix()


def _source(stored: dict, path: str) -> str:
    """Says where figures come from."""
    jax = stored["versions"].get("jax") or stored["rows"][0]["ready"]["kvjax"]["versions"]["jax"]
    return f"{stored['device']}, jax {jax}, {stored['date'][:10]}: [{path}]({path})"


def _compare() -> str:
    """Returns the table at a quarter of the tokens, storage at its own size, and the plot."""
    stored, path = _newest("compare")
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
    stored, path = _newest("peers")
    c = stored["claims"]
    return (
        f"Prefill of 2,048 tokens is {c['prefill_speedup']:.2f} times and decode {c['decode_speedup']:.2f} "
        f"times as fast\nas transformers on torch, float32, medians of alternating runs "
        f"({_source(stored, path)}).\n"
    )


def main() -> None:
    """Rewrites README.md."""
    _README.write_text(quoted(_README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
