"""Stands between the project and jax.experimental: the only file that imports it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import checkify

__all__ = ["checked", "debug_check"]

debug_check = checkify.debug_check


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps fn so that its debug checks run and raise on the host (jax.errors.JaxRuntimeError)."""
    run = jax.jit(checkify.checkify(fn))

    def call(*args: Any, **kwargs: Any) -> Any:
        error, out = run(*args, **kwargs)
        checkify.check_error(error)
        return out

    return call
