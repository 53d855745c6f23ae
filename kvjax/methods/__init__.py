"""Finds methods by name: every file of this folder that defines one is in `METHODS`.

A method's name is its file's; the class is the `CacheMethod` of the file's `__all__`.

Example:
    >>> import kvjax
    >>> kvjax.METHODS["snapkv"](budget=512)
    SnapKV(budget=512, window=32, kernel=5)
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, get_args

from kvjax.cache import Layer
from kvjax.method import CacheMethod
from kvjax.methods.sliding_window import SlidingWindow
from kvjax.models.config import ModelConfig

__all__ = ["METHODS", "build", "layers", "make", "per_layer"]

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", NoneType: "None"}


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
        ValueError: for an unknown name or setting, with the nearest known one; a setting that is
            missing or no number.
    """
    return build(METHODS, name, settings)


def build(methods: Mapping[str, type], name: str, settings: Mapping[str, Any]) -> Any:
    """Makes a method of the given registry, as `make` does of the built-in one."""
    if name not in methods:
        raise ValueError(f"a method is one of {', '.join(methods)}, got {name!r}{_nearest(name, methods)}")
    known = {field.name: field for field in fields(methods[name])}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(
                f"{name} takes {', '.join(known) or 'no settings'}, got {key!r}{_nearest(key, known)}"
            )
        kind = known[key].type
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        if _WORDS.keys() >= set(kinds) and not (
            type(value) in kinds or (float in kinds and type(value) is int)
        ):
            words = " or ".join(_WORDS[kind] for kind in kinds)
            raise ValueError(f"{name} takes {words} as {key}, got {value!r}")
    missing = [f.name for f in known.values() if f.default is MISSING and f.name not in settings]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}, got {dict(settings)}: give {missing[0]}=...")
    return methods[name](**settings)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else ""


def per_layer(method: CacheMethod, config: ModelConfig) -> tuple[CacheMethod, ...]:
    """Returns each layer's method: a ring for layers with a window, the given one for the others."""
    windows = config.layer_windows
    return tuple(
        SlidingWindow() if windows[i] else method.for_layer(i, config.n_layers)
        for i in range(config.n_layers)
    )


def layers(config: ModelConfig) -> tuple[Layer, ...]:
    """Returns each layer's attention settings."""
    return tuple(Layer.of(config, i) for i in range(config.n_layers))
