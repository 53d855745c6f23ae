"""Measures the rows of an experiment's command once, prints them, and claims their figures."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from experiments import options, results
from experiments.results import Results

__all__ = ["check_apart", "claims", "measured", "side_by_side", "start"]

_FIGURES = (
    "kl", "top1", "perplexity", "passkey_filler", "passkey_novel", "read", "step_tokens", "union", "lines",
    "share_held", "hit_rate", "hit_rate_tier", "hit_rate_ranked", "brought", "brought_tier", "place_ns",
    "gb_per_s", "asked_chunks", "disk_chunks", "disk_bytes", "share_of_chosen", "sparsity", "ffn_error",
    "off", "acc", "acc_norm", "exact_match",
)  # fmt: skip
_LONG = ("spec", "calibration")  # settings that are not printed


def start(experiment: str, command: str, settings: Any) -> Results:
    """Opens the results of a command."""
    arguments = map(shlex.quote, options.as_arguments(settings, skip=("out", "workers")))
    words = [f"python -m experiments.{experiment}", command, *arguments]
    folder = f"{experiment}_{command}"
    return results.start(folder, settings.seed, folder=settings.out, command=" ".join(words))


def check_apart(what: str, settings: Any) -> None:
    """Raises ValueError where texts are asked about that something was made from, or it is made from none.

    settings: an experiment's: `texts` and `learned`.
    """
    if set(settings.texts) & set(settings.learned) or not settings.learned:
        raise ValueError(
            f"{what} are asked about texts that they were not made from, got texts={settings.texts} and "
            f"learned={settings.learned}"
        )


def measured(stored: Results, row: Mapping[str, Any], figures: Callable[[], dict[str, Any]]) -> Results:
    """Adds a row unless it is stored, and prints it."""
    if stored.find(row) is None:
        stored = stored.add(row, figures())
    found = stored.find(row)
    named = (f"{k} {found[k]:.4g}" for k in _FIGURES if k in found)
    print(*(str(row[k]) for k in row if k not in _LONG), *named, sep=" | ", flush=True)
    return stored


def side_by_side(
    stored: Results, rows: Iterable[tuple[Mapping[str, Any], Callable[[], dict[str, Any]]]], workers: int
) -> Results:
    """Adds rows that are not stored, some at a time, and prints all in their order.

    Each row compiles programs of its own, in which Python waits; what rows have in common is read beforehand.

    Args:
        rows: what tells each row from all others, and what measures it.
        workers: rows that are measured at a time.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting = [(row, None if stored.find(row) else pool.submit(figures)) for row, figures in rows]
        for row, future in waiting:
            stored = measured(stored, row, future and future.result)
    return stored


def claims(model: str, rows: Sequence[Mapping[str, Any]], share: str) -> dict[str, float]:
    """Returns the figures that are quoted, `<model>.<method>.<figure>@<share>`.

    share: the name of the setting that says how much a row's method keeps, or reads.
    """
    found = {}
    for row in rows:
        name = f"{model.split('-')[0]}.{row['name'].replace(', ', '_')}"
        found |= {f"{name}.{k}@{row[share]:g}": row[k] for k in _FIGURES if k in row}
    return found
