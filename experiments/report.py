"""Shows the rows of a comparison as a table, and names the figures that docs quote."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from experiments.passkey import DEPTHS
from experiments.plan import Trial

__all__ = ["NOTE", "claims", "table"]

NOTE = """\
KL: mean over the prose, nats per token, full ‖ method. top-1: both prefer the same token. key: pass \
keys found.
question: whether the compression saw it. Only eviction loses what a later question needs, so the \
other methods have one row. At a budget of 100% evicting methods equal full.
held, read: bytes of the state and of what a decode step reads of it, as shares of full.
replay: s, the method's own work on the prompt, after a prefill that all share. step: ms, all rows. \
compile: s, the row's programs, two compiled at a time; near 0 when they are cached on disk."""
_COLUMNS = (
    "\nmethod",
    "\nbudget",
    "ques-\ntion",
    "perpl\nexity",
    "\nKL",
    "top\n-1",
    "\nkey",
    "\nheld",
    "\nread",
    "re-\nplay",
    "\nstep",
    "com-\npile",
)  # fmt: skip  78 columns in all


def table(rows: Sequence[dict]) -> Table:
    """Returns the table for a terminal."""
    first = rows[0]
    held = first["bytes_held"] / first["held"] / 1e6
    title = f"{first['model']}, {first['dtype']}; full cache {held:.1f} MB a row; "
    title += f"prefill of {first['batch']} rows {first['prefill_s']:.1f} s"
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, padding=0)
    for name in _COLUMNS:
        made.add_column(name, justify="left" if name in _COLUMNS[:3:2] else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before["name"] != row["name"]:
            made.add_section()
        made.add_row(*_cells(row))
    return made


def claims(trial: Trial, values: dict) -> dict[str, float]:
    """Returns the named figures of a row, `<method>.<figure>@<budget>`; full has no budget."""
    at = "" if trial.name == "full" else f"@{trial.ratio:.6g}"
    if trial.question == "seen":
        return {f"{trial.name}.passkey_seen{at}": values["passkey"]}
    named = {"perplexity": values["perplexity"], "kl": values["kl"], "passkey": values["passkey"]}
    return {f"{trial.name}.{name}{at}": value for name, value in named.items() if value is not None}


def _cells(row: dict) -> list[str]:
    return [
        row["name"],
        f"{row['ratio']:.3g} {row['budget']:>5}",
        row["question"],
        _number(row["perplexity"], ".2f"),
        _number(row["kl"], ".4f"),
        _number(row["top1"], ".0%"),
        f"{row['passkey']}/{len(DEPTHS)}",
        _number(row["held"], ".0%"),
        _number(row["read"], ".0%"),
        _number(row["replay_s"], ".1f"),
        _number(1e3 * row["decode_step_s"], ".0f"),
        _number(row["compile_s"], ".1f"),
    ]


def _number(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)
