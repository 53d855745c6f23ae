"""Draws what methods lose over the share that they keep, or read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import canvas

__all__ = ["draw"]


def draw(rows: Sequence[Mapping[str, Any]], path: Path, share: str, label: str) -> None:
    """Draws KL over the row's `share`, one line per method; the first one's points are marked on the axis."""
    with canvas.styled():
        figure, (axes,) = canvas.panels(1)
        names = dict.fromkeys(row["name"] for row in rows if row["name"] != "full")
        lines = {
            name: sorted((row[share], row["kl"]) for row in rows if row["name"] == name) for name in names
        }
        for i, (name, line) in enumerate(lines.items()):
            colour = canvas.COLOURS[i % len(canvas.COLOURS)]
            axes.plot(*zip(*line, strict=True), color=colour, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", nonpositive="mask")
        canvas.percent(axes, [x for x, _ in next(iter(lines.values()), ())])
        axes.set_xlabel(label)
        axes.set_ylabel("KL to the full cache, nats per token")
        axes.legend(frameon=False)
        canvas.save(figure, path)
