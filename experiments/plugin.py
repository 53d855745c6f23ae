"""Loads a method from a file of the user's."""

import dataclasses
import importlib.util
import inspect
import sys
from pathlib import Path

from kvjax.method import CacheMethod

__all__ = ["load"]


def load(path: Path) -> dict[str, type[CacheMethod]]:
    """Returns the methods that a file defines, under the file's name (or the classes', if several).

    Raises:
        ValueError: for a file that cannot be run, or defines none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"a plugin is a .py file, got {str(path)!r}: check the path")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None:
        raise ValueError(f"a plugin is a .py file, got {str(path)!r}: rename it")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"a plugin is a module that runs, got {error!r} in {str(path)!r}: mend it"
        ) from error
    kinds = [
        kind for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, CacheMethod) and kind.__module__ == path.stem
    ]  # fmt: skip
    if not kinds or not all(dataclasses.is_dataclass(kind) for kind in kinds):
        raise ValueError(
            f"a plugin defines a CacheMethod that is a frozen dataclass, got {kinds} in {str(path)!r}"
        )
    return {path.stem if len(kinds) == 1 else kind.__name__.lower(): kind for kind in kinds}
