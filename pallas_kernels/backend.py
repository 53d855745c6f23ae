"""Stands between the project and jax.experimental: the only file that imports it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import checkify

__all__ = ["checked", "debug_check"]

debug_check = checkify.debug_check


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps fn so that its debug checks run and raise on the host, as a ValueError.

    Example:
        >>> def root(x):
        ...     debug_check(x >= 0, "x is not negative")
        ...     return x**0.5
        >>> try:
        ...     checked(root)(-1.0)
        ... except ValueError as error:
        ...     print(error)
        x is not negative (`check` failed)
    """
    run = jax.jit(checkify.checkify(fn))

    def call(*args: Any, **kwargs: Any) -> Any:
        error, out = run(*args, **kwargs)
        checkify.check_error(error)
        return out

    return call
