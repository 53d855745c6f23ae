"""Finds methods by name: every file of this folder that defines one is in `METHODS`.

A method's name is its file's; the class is the `CacheMethod` of the file's `__all__`.
"""

import difflib
import importlib
import pkgutil
from typing import Any

from kvjax.cache import Layer
from kvjax.method import CacheMethod
from kvjax.methods.sliding_window import SlidingWindow
from kvjax.models.config import ModelConfig

__all__ = ["METHODS", "make", "per_layer"]


def _find() -> dict[str, type[CacheMethod]]:
    """Maps file names to the method each defines."""
    found = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: (info.name != "full", info.name)):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name in module.__all__:
            if issubclass(getattr(module, name), CacheMethod):
                found[info.name] = getattr(module, name)
    del found["sliding_window"]  # belongs to a model's layers, not to a user's choice
    return found


METHODS = _find()


def make(name: str, **settings: Any) -> CacheMethod:
    """Makes a method by name, for example `make("snapkv", budget=512)`.

    Raises:
        ValueError: for an unknown name or setting, with the nearest known one.
    """
    if name not in METHODS:
        raise ValueError(f"a method is one of {', '.join(METHODS)}, got {name!r}{_nearest(name, METHODS)}")
    known = METHODS[name].__dataclass_fields__
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} takes {', '.join(known) or 'no settings'}, got {key!r}{_nearest(key, known)}")
    return METHODS[name](**settings)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else ""


def per_layer(method: CacheMethod, config: ModelConfig) -> tuple[CacheMethod, ...]:
    """Returns each layer's method: a ring for layers with a window, the given one for the others."""
    windows = config.layer_windows
    return tuple(SlidingWindow() if windows[i] else method.for_layer(i) for i in range(config.n_layers))


def layers(config: ModelConfig) -> tuple[Layer, ...]:
    """Returns each layer's attention settings."""
    return tuple(Layer.of(config, i) for i in range(config.n_layers))
