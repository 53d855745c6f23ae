"""Chooses the implementation of an op: the only place that does.

impl None takes the first that runs, the kernel of the platform before the reference, and reports
which; a name runs that one or raises. Nothing falls back silently.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels import backend, tuning

__all__ = ["run", "watch"]

_log = logging.getLogger("pallas_kernels")
_watched: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("watched", default=None)


@contextlib.contextmanager
def watch() -> Iterator[dict[str, str]]:
    """Records which implementation each op took, as programs are traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.attention import AttentionForm
        >>> from pallas_kernels.decode_attention import decode_attention
        >>> k = jnp.ones((1, 32, 64))
        >>> with watch() as taken:
        ...     _ = decode_attention(k[:, None, :4], k, k, k[..., 0], form=AttentionForm(slots=(32,)))
        >>> taken
        {'decode_attention': 'reference'}
    """
    token = _watched.set({})
    try:
        yield _watched.get()
    finally:
        _watched.reset(token)


def run(
    op: str, impl: str | None, impls: Mapping[str, Callable[..., Any]], *args: Any, **options: Any
) -> Any:
    """Runs an op's implementation.

    Args:
        impls: "reference", and "gpu" and "tpu" where the op has them. A kernel raises
            NotImplementedError for shapes and types it does not take.

    Raises:
        ValueError: for an impl the op does not have.
        NotImplementedError: for an impl named that this machine or shape cannot run.
    """
    at = backend.target()
    platform = at.platform
    if impl is None:
        names = [name for name in (platform, "reference") if name in impls]
    elif impl not in impls:
        raise ValueError(f"{op} has the implementations {', '.join(impls)}, got {impl=}")
    elif impl not in ("reference", platform):
        raise NotImplementedError(
            f"{op}: impl={impl!r} runs on a {impl.upper()}, got platform {platform!r}: "
            f"use impl='reference', or None for what runs here"
        )
    else:
        names = [impl]
    for name in names:
        try:
            if name != "reference":
                _admit(op, at)
            out = _traced_once(impls[name], tuple(options), tuning.epoch())(*args, **options)
        except NotImplementedError as why:
            if name == names[-1]:
                raise
            _warn(f"{op}: the {name} kernel does not take this, so the reference runs: {why}")
        else:
            _report(op, name)
            return out
    raise NotImplementedError(f"{op} has no implementation for {platform!r}")


@functools.lru_cache(maxsize=256)
def _traced_once(impl: Callable[..., Any], options: tuple[str, ...], epoch: object) -> Callable[..., Any]:
    """Returns an implementation that is traced and lowered once in an epoch, however many layers call it."""

    def run(*args: Any, **options: Any) -> Any:  # a function of its own: JAX keeps traces by the function
        return impl(*args, **options)

    return jax.jit(run, static_argnames=options)


def _admit(op: str, at: backend.Target) -> None:
    """Raises for a GPU that XLA compiles no Triton for: one before Ampere."""
    if at.capability is not None and at.capability < (8, 0):
        version = ".".join(map(str, at.capability))
        raise NotImplementedError(
            f"{op}: kernels run on GPUs of compute capability 8.0 (A100, L4) and above, got {version} of "
            f"{at.device!r}: use impl='reference', or None for what runs here"
        )


@functools.cache
def _warn(message: str) -> None:
    """Says it once: a model's layers and programs all ask the same."""
    _log.warning(message)


def _report(op: str, name: str) -> None:
    _log.info("%s: %s", op, name)
    if (watched := _watched.get()) is not None:
        watched[op] = name
