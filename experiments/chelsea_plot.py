"""Draws the figures of Chelsea's experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.canvas import COLOURS, panels, save, styled

__all__ = ["draw_line", "draw_long", "draw_sweep"]

Rows = Sequence[Mapping[str, Any]]


def draw_sweep(rows: Rows, path: Path) -> None:
    """Draws the KL of each setting as a bar per share, the defaults as a line."""
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    with styled():
        figure, parts = panels(len(keeps), height=0.28 * len(rows) / len(keeps) + 1.4)
        for axes, keep in zip(parts, keeps, strict=True):
            part = [row for row in rows if row["keep"] == keep][::-1]
            axes.barh(
                [row["setting"] or "defaults" for row in part], [row["kl"] for row in part], color=COLOURS[0]
            )
            default = next((row["kl"] for row in part if not row["setting"]), None)
            if default is not None:
                axes.axvline(default, color=COLOURS[6], linewidth=0.8)
            axes.set_title(f"{keep:.0%} of the slots")
            axes.set_xlabel("KL to the full cache, nats per token")
        save(figure, path)


def draw_long(rows: Rows, prompt: int, new: int, path: Path) -> None:
    """Draws KL over the place in a long text, one line per method."""
    with styled():
        figure, (axes,) = panels(1)
        for i, row in enumerate(rows):
            spans = row["kl_spans"]
            place = prompt + (np.arange(len(spans)) + 0.5) * new / len(spans)
            axes.plot(place, spans, color=COLOURS[i % len(COLOURS)], marker="o", label=row["name"])
        axes.set_xlabel("tokens read")
        axes.set_ylabel("KL to the full cache, nats per token")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        save(figure, path)


def draw_line(values: Mapping[str, Any], title: str, path: Path) -> None:
    """Draws the time of a decode step over the length of the context, and the lines fitted to it.

    values: per method NAME in tokens and µs: NAME_us at each of `tokens`, NAME_start_us, NAME_us_per_1k.
    """
    tokens = np.asarray(values["tokens"]) / 1024
    with styled():
        figure, (axes,) = panels(1)
        for colour, name in zip(COLOURS, ("full", "chelsea"), strict=False):
            line = values[f"{name}_start_us"] + values[f"{name}_us_per_1k"] * tokens
            axes.plot(tokens, line / 1e3, color=colour)
            axes.plot(tokens, np.asarray(values[f"{name}_us"]) / 1e3, "o", color=colour, label=name)
        axes.set_title(title)
        axes.set_xlabel("tokens of context, in units of 1,024")
        axes.set_ylabel("decode step, ms")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        save(figure, path)
