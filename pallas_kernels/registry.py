"""Finds the ops: every folder here with a `specs.py` has one."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping

import pallas_kernels
from pallas_kernels.op import Op

__all__ = ["ops"]


@functools.cache
def ops() -> Mapping[str, Op]:
    """Returns every op by name.

    Example:
        >>> "decode_attention" in ops()
        True
    """
    folders = [info.name for info in pkgutil.iter_modules(pallas_kernels.__path__) if info.ispkg]
    found = [importlib.import_module(f"pallas_kernels.{name}.specs").OP for name in sorted(folders)]
    return {op.name: op for op in found}
