"""Makes the panels of a picture, and writes it whole."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["COLOURS", "panels", "percent", "save", "styled"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_STYLE = {"font.size": 10, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}


def styled() -> mpl.rc_context:
    """Returns a context in which pictures are drawn in one style."""
    return mpl.rc_context(_STYLE)


def panels(n: int, height: float = 4.2) -> tuple[Figure, Sequence[Axes]]:
    """Returns a picture of n panels side by side, and the panels."""
    figure = Figure(figsize=(6.4 if n == 1 else 5.2 * n, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, n, squeeze=False)[0]


def percent(axes: Axes, shares: Sequence[float]) -> None:
    """Marks shares on the horizontal axis."""
    axes.set_xticks(shares, [f"{100 * x:.3g}%" for x in shares])
    axes.minorticks_off()


def save(figure: Figure, path: Path) -> None:
    """Writes the picture in one go.

    Raises:
        OSError: where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
