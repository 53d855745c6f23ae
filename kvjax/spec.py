"""Reads a method from a line of text, as it is written on command lines and in configurations.

snapkv                          by name; settings have their defaults
snapkv:budget=512,window=16     with settings
snapkv:budget=512+kivi:bits=4   a chain
kivi4                           a number after the name is its `bits`
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvjax.method import chain
from kvjax.methods import METHODS, build

__all__ = ["parse", "settings_of"]


def parse(text: str, methods: Mapping[str, type] = METHODS, **defaults: Any) -> Any:
    """Returns the method that a line of text names, of the cache or of another registry without chains.

    Args:
        methods: the names that it may use.
        defaults: settings for each part that has them and does not name them, such as budget=512.

    Raises:
        ValueError: for an unknown name or setting (with the nearest known one), or a bad value.

    Example:
        >>> parse("snapkv:window=16+kivi4", budget=512)  # doctest: +NORMALIZE_WHITESPACE
        Chain(methods=(SnapKV(budget=512, window=16, kernel=5), KIVI(bits=4, block=32, window=32)))
    """
    parts = []
    for part in text.split("+"):
        name, settings = _split(part, methods)
        known = _fields(name, methods)
        parts.append(build(methods, name, {k: v for k, v in defaults.items() if k in known} | settings))
    return chain(*parts) if len(parts) > 1 else parts[0]


def settings_of(text: str, methods: Mapping[str, type] = METHODS) -> set[str]:
    """Returns the names of the settings that the parts of a line have but do not give."""
    found = set()
    for part in text.split("+"):
        name, given = _split(part, methods)
        found |= _fields(name, methods) - set(given)
    return found


def _split(part: str, methods: Mapping[str, type]) -> tuple[str, dict[str, Any]]:
    """Splits `name:key=value,key=value`."""
    name, _, rest = (x.strip() for x in part.partition(":"))
    settings = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = (x.strip() for x in pair.partition("="))
        if not equals:
            raise ValueError(f"a setting is written key=value, got {pair!r} in {part!r}: write {key}=...")
        if key in settings:
            raise ValueError(f"a setting is given once, got {key!r} twice in {part!r}: leave one out")
        settings[key] = value if key in _words(name, methods) else _value(key, value)
    short = re.fullmatch(r"(.+?)(\d+)", name)
    if name not in methods and short and "bits" in _fields(short[1], methods):
        name, settings = short[1], {"bits": int(short[2])} | settings
    return name, settings


def _fields(name: str, methods: Mapping[str, type]) -> set[str]:
    """Returns the names of a method's settings, none for an unknown one."""
    return {field.name for field in fields(methods[name])} if name in methods else set()


def _words(name: str, methods: Mapping[str, type]) -> set[str]:
    """Returns the names of a method's settings that are words."""
    if name not in methods:
        return set()
    return {
        field.name
        for field in fields(methods[name])
        if isinstance(field.default, str) or field.type in (str | None, "str | None")
    }


def _value(key: str, text: str) -> Any:
    """Returns a number, True, False or None."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if value is not None and not isinstance(value, bool | int | float):
        raise ValueError(f"a setting is a number, True, False or None, got {key}={text!r}: check its value")
    return value
