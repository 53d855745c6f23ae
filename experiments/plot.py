"""Draws quality against bytes: mean KL to the full cache over what is held, and over what is read."""

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments import canvas

__all__ = ["draw", "path_of"]

# Okabe and Ito's colours without the yellow, which is too light for a line, and a grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8C6D31", "#7B61A8")
_MARKERS = "osD^vPX*h"
_PALE, _DARK = "#d9d9d9", "#4d4d4d"
_STYLE = {"font.size": 10, "font.family": "sans-serif", "axes.edgecolor": _DARK, "text.color": "#1a1a1a"}
_OFFSET, _LETTER, _PANEL_WIDTH = (
    12,
    6.2,
    330,
)  # points: of a name from its line, a letter's and a panel's width
_PANELS = (("held", "bytes held"), ("read", "bytes read in a decode step"))


def path_of(results: Path) -> Path:
    """Returns the picture's path, beside the results."""
    return results.with_suffix(".png")


def draw(rows: Sequence[dict], path: Path) -> None:
    """Writes the picture of the rows whose compression did not see the question.

    Raises:
        OSError: where it cannot be written.
    """
    lines = _lines(rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 5.2), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        bottom = _scale_y(panels[0], [row["kl"] for line in lines.values() for row in line])
        for axes, (key, title) in zip(panels, _PANELS, strict=True):
            for place, (_, line) in enumerate(lines.items()):
                _draw_line(axes, line, key, place)
            _draw_full(axes, bottom)
            _scale_x(axes, {name: [row[key] for row in line] for name, line in lines.items()}, title)
        panels[0].set_ylabel("mean KL to the full cache, nats per token")
        first = rows[0]
        figure.suptitle(
            f"{Path(first['model']).name}: what each method loses for the bytes it saves",
            x=0.01,
            ha="left",
            weight="bold",
        )
        figure.draw_without_rendering()
        for axes, (key, _) in zip(panels, _PANELS, strict=True):
            _label(axes, {name: line[-1] for name, line in lines.items()}, key)
        canvas.save(figure, path)


def _lines(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Returns each method's rows from the largest to the smallest; widths of one storage are one line."""
    lines: dict[str, list[dict]] = {}
    for row in rows:
        if row["question"] == "unseen" and row["name"] != "full" and row["kl"] is not None:
            name = re.sub(r"\d+$", "", row["name"]) if row["ratio"] == 1 else row["name"]
            lines.setdefault(name, []).append(row)
    return {name: sorted(line, key=lambda r: (-r["held"], -r["read"])) for name, line in lines.items()}


def _draw_line(axes: Axes, line: Sequence[dict], key: str, place: int) -> None:
    x, y = [row[key] for row in line], [max(row["kl"], 1e-9) for row in line]
    colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
    axes.plot(x, y, color=colour, marker=marker, markersize=7, linewidth=1.6, mec="white", mew=0.7, zorder=3)


def _draw_full(axes: Axes, bottom: float) -> None:
    """Marks the full cache on the axis: its KL of 0 has no place on a log scale."""
    axes.plot(
        [1], [bottom], marker="o", markersize=8, color="white", markeredgecolor=_DARK, clip_on=False, zorder=5
    )
    axes.annotate(
        "full: 0", (1, bottom), xytext=(0, 9), textcoords="offset points", ha="center", color=_DARK,
    )  # fmt: skip


def _scale_y(axes: Axes, values: Sequence[float]) -> float:
    """Sets a log scale with room below the smallest value, and returns its bottom."""
    positive = [v for v in values if v > 1e-9] or [1e-3]
    bottom, top = 10 ** np.floor(np.log10(min(positive)) - 0.35), max(positive) * 2.2
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _power(v) if v > bottom * 1.01 else ""))
    axes.yaxis.set_minor_locator(NullLocator())
    return bottom


def _power(value: float) -> str:
    return f"{value:g}" if value > 5e-4 else f"$10^{{{round(np.log10(value))}}}$"


def _scale_x(axes: Axes, lines: dict[str, list[float]], title: str) -> None:
    """Sets a scale of halvings, wide enough for each line's name left of its last point."""
    smallest = min([0.5, *(x for line in lines.values() for x in line)])
    right = np.log2(max([1.0, *(x for line in lines.values() for x in line)]) * 1.22)
    shares = {name: (_OFFSET + _LETTER * len(name)) / _PANEL_WIDTH for name in lines}
    left = [(np.log2(line[-1]) - shares[n] * right) / (1 - shares[n]) for n, line in lines.items()]
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** min([np.log2(smallest) - 0.5, *left]), 2**right)
    halvings = [2.0**-n for n in range(int(np.ceil(-np.log2(smallest))) + 1)]
    axes.xaxis.set_major_locator(FixedLocator(halvings))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.1f}%".replace(".0%", "%")))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{title}, share of the full cache")
    axes.grid(color=_PALE, linewidth=0.6, zorder=0)
    axes.tick_params(length=0, colors=_DARK)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _label(axes: Axes, ends: dict[str, dict], key: str) -> None:
    """Writes each line's name left of its last point, moved up or down where names would overlap."""
    points = 72 / axes.figure.dpi
    floor = axes.get_ylim()[0]
    at = [axes.transData.transform((row[key], max(row["kl"], floor))) * points for row in ends.values()]
    spans = [(x - _OFFSET - _LETTER * len(name), x - _OFFSET) for name, (x, _) in zip(ends, at, strict=True)]
    heights = _apart([y for _, y in at], spans)
    for place, (name, end, height) in enumerate(zip(ends, at, heights, strict=True)):
        colour = _COLOURS[place % len(_COLOURS)]
        line = {"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (1, 0.5)}
        text = axes.annotate(
            name, end / points, xycoords="figure pixels", xytext=(-_OFFSET, height - end[1]),
            textcoords="offset points", ha="right", va="center", color=colour, weight="bold", fontsize=9.5,
            arrowprops=line if abs(height - end[1]) > 3 else None,
        )  # fmt: skip
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _apart(heights: Sequence[float], spans: Sequence[tuple[float, float]], gap: float = 12.5) -> list[float]:
    """Moves heights apart, in their order and as little as possible, where spans overlap."""
    heights = list(heights)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for _ in range(200):
        for n, low in enumerate(order):
            for high in order[n + 1 :]:
                near = gap - (heights[high] - heights[low])
                if near > 0 and spans[low][0] < spans[high][1] and spans[high][0] < spans[low][1]:
                    heights[low] -= near / 2
                    heights[high] += near / 2
    return heights
