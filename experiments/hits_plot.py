"""Draws the hit rate of lines on the device over how many there are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import canvas

__all__ = ["draw"]

_POLICIES = (("hit_rate", "exact LRU", "-"), ("hit_rate_tier", "the tier's rule", "--"))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a panel for each ratio, and in it a line for each size of blocks and each policy."""
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    with canvas.styled():
        figure, parts = canvas.panels(len(ratios))
        for axes, ratio in zip(parts, ratios, strict=True):
            for colour, block in zip(canvas.COLOURS, blocks, strict=False):
                for key, policy, style in _POLICIES:
                    line = [
                        (row["hot"], row[key])
                        for row in rows
                        if row["ratio"] == ratio and row["block"] == block and key in row
                    ]
                    if line:
                        name = f"{'single tokens' if block == 1 else f'blocks of {block}'}, {policy}"
                        axes.plot(
                            *zip(*sorted(line), strict=True), style, color=colour, marker="o", label=name
                        )
            hot = sorted({row["hot"] for row in rows})
            axes.set_xscale("symlog", base=2, linthresh=1)  # 0 has a place
            axes.set_xticks(hot, [f"{x:g}" for x in hot])
            axes.minorticks_off()
            axes.set_title(f"{100 * ratio:g}% of the tokens per query head")
            axes.set_xlabel("tokens of lines, in units of what a step reads")
            axes.set_ylabel("share of what is read that is on the device")
            axes.set_ylim(0, 1.02)
            axes.legend(frameon=False)
        canvas.save(figure, path)
