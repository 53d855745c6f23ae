"""Finds the settings of a kernel: what the tuner stored for this device, else the kernel's default.

A file `<op>/tuned/<device>.json` holds rows of {"key": {...}, "settings": {...}}. Words of a key
must match, and `head_dim` be as large, since tiles of larger heads may not fit; of the rows that
remain, the one whose numbers are nearest, by their ratios, is taken; of equal ones the device's own before
those of others of the same chip, which `_CHIPS` names.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from pallas_kernels import backend

__all__ = ["epoch", "force", "forget", "path", "settings", "watch"]

Settings = TypeVar("Settings")

_CHIPS = {r"NVIDIA G?H[12]00\b.*": ("NVIDIA H100 80GB HBM3", "NVIDIA H200")}  # they differ in memory

_forced = jax.make_user_context(default_value=None)


_watched: contextvars.ContextVar[dict[str, tuple[Any, dict]] | None] = contextvars.ContextVar(
    "watched", default=None
)
_epoch: contextvars.ContextVar[object | None] = contextvars.ContextVar("epoch", default=None)


@contextlib.contextmanager
def watch() -> Iterator[dict[str, tuple[Any, dict]]]:
    """Records, per op, which settings it took and for which key, as programs are traced."""
    tokens = _watched.set({}), _epoch.set(object())
    try:
        yield _watched.get()
    finally:
        _watched.reset(tokens[0])
        _epoch.reset(tokens[1])


def epoch() -> object:
    """Returns what stays the same while settings that were taken hold, and nobody watches for new ones."""
    return _epoch.get() or _latest()


@functools.cache
def _latest() -> object:
    return object()


@contextlib.contextmanager
def force(op: str, chosen: Any) -> Iterator[None]:
    """Makes an op use these settings: how the tuner tries them."""
    with _forced((op, chosen)):
        yield


def path(op: str, device: str) -> Path:
    """Returns where the settings of a device are stored."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(__file__).parent / op / "tuned" / f"{slug}.json"


def settings(op: str, default: Settings, **key: int | str) -> Settings:
    """Returns the settings for a case, of default's type.

    Args:
        op: its name.
        key: what the best settings depend on: numbers and words.
    """
    chosen = default
    if _forced.value is not None and _forced.value[0] == op and type(_forced.value[1]) is type(default):
        chosen = _forced.value[1]
    elif rows := [row for row in _rows(op, backend.target().device) if _matches(row["key"], key)]:
        best = min(rows, key=lambda row: _distance(row["key"], key))
        chosen = dataclasses.replace(default, **best["settings"])
    if (watched := _watched.get()) is not None:
        watched[op] = (chosen, key)
    return chosen


def forget() -> None:
    """Makes stored settings be read anew."""
    _rows.cache_clear()
    _latest.cache_clear()


@functools.cache
def _rows(op: str, device: str) -> list[Mapping[str, Any]]:
    same_chip = [name for chip, others in _CHIPS.items() if re.fullmatch(chip, device) for name in others]
    files = [path(op, name) for name in dict.fromkeys((device, *same_chip))]
    return [row for f in files if f.exists() for row in json.loads(f.read_text(encoding="utf-8"))["rows"]]


def _matches(row: Mapping[str, Any], case: Mapping[str, Any]) -> bool:
    if row.keys() != case.keys() or row.get("head_dim", 0) < case.get("head_dim", 0):
        return False
    return all(row[k] == case[k] for k in row if isinstance(row[k], str))


def _distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    return sum(abs(math.log2(a[k] / b[k])) for k in a if not isinstance(a[k], str))
