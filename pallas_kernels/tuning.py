"""Finds the settings of a kernel: what the tuner stored for this device, else the kernel's default.

A file `<op>/tuned/<device>.json` holds rows of {"key": {...}, "settings": {...}}. Words of a key
must match; of the rows that do, the one whose numbers are nearest, by their ratios, is taken.
"""

import contextlib
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

__all__ = ["force", "path", "settings"]

Settings = TypeVar("Settings")

_forced = jax.make_user_context(default_value=None)


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
        op: the op, or "op/part" for a kernel of its own inside an op.
        key: what the best settings depend on: numbers and words.
    """
    if _forced.value is not None and _forced.value[0] == op and type(_forced.value[1]) is type(default):
        return _forced.value[1]
    rows = [row for row in _rows(op, backend.target().device) if _matches(row["key"], key)]
    if not rows:
        return default
    best = min(rows, key=lambda row: _distance(row["key"], key))
    return dataclasses.replace(default, **best["settings"])


@functools.cache
def _rows(op: str, device: str) -> list[Mapping[str, Any]]:
    stored = path(op, device)
    return json.loads(stored.read_text(encoding="utf-8"))["rows"] if stored.exists() else []


def _matches(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k] == b[k] for k in a if isinstance(a[k], str))


def _distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    return sum(abs(math.log2(a[k] / b[k])) for k in a if not isinstance(a[k], str))
