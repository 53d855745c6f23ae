"""Draws what methods of activation sparsity lose over their sparsity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import canvas

__all__ = ["draw"]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws KL over the sparsity that was measured, a line per method, dashed where it is refined."""
    with canvas.styled():
        figure, (axes,) = canvas.panels(1)
        for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            for form, style in (("closed", "-"), ("refined", "--")):
                line = sorted(
                    (r["sparsity"], r["kl"]) for r in rows if (r["name"], r["form"]) == (name, form)
                )
                if line:
                    label = name if form == "closed" else f"{name}, refined"
                    colour = canvas.COLOURS[i % len(canvas.COLOURS)]
                    axes.plot(*zip(*line, strict=True), style, color=colour, marker="o", label=label)
        axes.set_yscale("log", nonpositive="mask")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.set_xlabel("sparsity measured, of the weights at sparse sites")
        axes.set_ylabel("KL to the dense model, nats per token")
        axes.legend(frameon=False)
        canvas.save(figure, path)
