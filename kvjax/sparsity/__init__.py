"""Finds methods of activation sparsity by name: every file of this folder with one is in `SPARSITIES`.

A method's name is its file's; the class is the `ActivationSparsity` of the file's `__all__`.

Example:
    >>> import kvjax.sparsity
    >>> kvjax.sparsity.SPARSITIES["chess"](0.5, plus=True)
    Chess(sparsity=0.5, plus=True, statistic='mean', group=1)
"""

import importlib
import pkgutil

from kvjax.thresholds import ActivationSparsity

__all__ = ["SPARSITIES"]


def _find() -> dict[str, type[ActivationSparsity]]:
    """Maps file names to the method each defines."""
    found = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name in module.__all__:
            if issubclass(getattr(module, name), ActivationSparsity):
                found[info.name] = getattr(module, name)
    return found


SPARSITIES = _find()
