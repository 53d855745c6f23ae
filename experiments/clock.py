"""Measures wall time with compilation apart, from the durations that JAX reports."""

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax

__all__ = ["Span", "timed"]

_EVENTS = "/jax/core/compile/"  # tracing, lowering, compiling (or loading from the cache on disk)
_open: list["Span"] = []  # spans being measured


@dataclass
class Span:
    """What a piece of work took. Times are in seconds; run_s leaves compilation out."""

    run_s: float = 0.0
    compile_s: float = 0.0
    thread: int = field(default_factory=threading.get_ident)
    parts: list[tuple[float, float]] = field(default_factory=list)


@contextmanager
def timed() -> Iterator[Span]:
    """Measures the block. Its results must be ready at the end: use `jax.block_until_ready`."""
    _listen()
    span = Span()
    _open.append(span)
    start = time.perf_counter()
    try:
        yield span
    finally:
        _open.remove(span)
        span.compile_s = _union(span.parts)
        span.run_s = time.perf_counter() - start - span.compile_s


def _union(parts: list[tuple[float, float]]) -> float:
    """Returns the time that intervals cover together: tracing reports its inner functions too."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(parts):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


@functools.cache
def _listen() -> None:
    """Starts listening, once."""
    jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(name: str, duration: float, **_) -> None:
    if name.startswith(_EVENTS):
        now, thread = time.perf_counter(), threading.get_ident()
        for span in _open:
            if span.thread == thread:
                span.parts.append((now - duration, now))
