"""Draws the figures of Chelsea's experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_line", "draw_long", "draw_quality", "draw_sweep"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_STYLE = {"font.size": 10, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
Rows = Sequence[Mapping[str, Any]]


def draw_sweep(rows: Rows, path: Path) -> None:
    """Draws the KL of each setting as a bar per share, the defaults as a line."""
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    with mpl.rc_context(_STYLE):
        figure, panels = _figure(len(keeps), height=0.28 * len(rows) / len(keeps) + 1.4)
        for axes, keep in zip(panels, keeps, strict=True):
            part = [row for row in rows if row["keep"] == keep][::-1]
            axes.barh(
                [row["setting"] or "defaults" for row in part], [row["kl"] for row in part], color=_COLOURS[0]
            )
            default = next((row["kl"] for row in part if not row["setting"]), None)
            if default is not None:
                axes.axvline(default, color=_COLOURS[6], linewidth=0.8)
            axes.set_title(f"{keep:.0%} of the slots")
            axes.set_xlabel("KL to the full cache, nats per token")
        _save(figure, path)


def draw_quality(rows: Rows, path: Path) -> None:
    """Draws KL over the share of slots kept, one line per method."""
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _figure(1)
        for i, name in enumerate(dict.fromkeys(row["name"] for row in rows if row["name"] != "full")):
            line = sorted((row["keep"], row["kl"]) for row in rows if row["name"] == name)
            axes.plot(*zip(*line, strict=True), color=_COLOURS[i % len(_COLOURS)], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _percent(axes, sorted({row["keep"] for row in rows if row["name"] != "full"}))
        axes.set_xlabel("slots kept, share of the prompt")
        axes.set_ylabel("KL to the full cache, nats per token")
        axes.legend(frameon=False)
        _save(figure, path)


def draw_long(rows: Rows, prompt: int, new: int, path: Path) -> None:
    """Draws KL over the place in a long text, one line per method."""
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _figure(1)
        for i, row in enumerate(rows):
            spans = row["kl_spans"]
            place = prompt + (np.arange(len(spans)) + 0.5) * new / len(spans)
            axes.plot(place, spans, color=_COLOURS[i % len(_COLOURS)], marker="o", label=row["name"])
        axes.set_xlabel("tokens read")
        axes.set_ylabel("KL to the full cache, nats per token")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        _save(figure, path)


def draw_line(values: Mapping[str, Any], title: str, path: Path) -> None:
    """Draws the time of a decode step over the length of the context, and the lines fitted to it.

    values: per method NAME in tokens and µs: NAME_us at each of `tokens`, NAME_start_us, NAME_us_per_1k.
    """
    tokens = np.asarray(values["tokens"]) / 1024
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _figure(1)
        for colour, name in zip(_COLOURS, ("full", "chelsea"), strict=False):
            line = values[f"{name}_start_us"] + values[f"{name}_us_per_1k"] * tokens
            axes.plot(tokens, line / 1e3, color=colour)
            axes.plot(tokens, np.asarray(values[f"{name}_us"]) / 1e3, "o", color=colour, label=name)
        axes.set_title(title)
        axes.set_xlabel("tokens of context, in units of 1,024")
        axes.set_ylabel("decode step, ms")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        _save(figure, path)


def _figure(n_panels: int, height: float = 4.2) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(6.4 if n_panels == 1 else 5.2 * n_panels, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, n_panels, squeeze=False)[0]


def _percent(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xticks(shares, [f"{100 * x:g}%" for x in shares])
    axes.minorticks_off()


def _save(figure: Figure, path: Path) -> None:
    """Writes the picture in one go.

    Raises:
        OSError: where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
