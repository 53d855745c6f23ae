"""Reads an experiment's typed options from the command line and from a TOML file of the same keys."""

import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import tyro

from kvjax.models.families import nearest

__all__ = ["as_arguments", "parse"]

Options = TypeVar("Options")


def parse(kind: type[Options], arguments: Sequence[str], description: str) -> Options:
    """Returns the options; what the command line gives wins over `--config FILE.toml`.

    Raises:
        ValueError: for an unknown key in the file, or a file that is no TOML.
        OSError: for a file that cannot be read.
        SystemExit: for arguments that tyro refuses (it has said why), and after --help.
    """
    rest, path = _without_config(arguments)
    given = _from_toml(kind, path) if path else []
    hint = "\n\n--config FILE.toml reads options from a file of the same names."
    return tyro.cli(kind, args=[*given, *rest], description=description + hint)


def as_arguments(options: Any, skip: Sequence[str] = ()) -> list[str]:
    """Returns the arguments that give these options: those that are not the default."""
    arguments = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in skip and value != field.default:
            arguments += _argument(field.name, value)
    return arguments


def _without_config(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Splits `--config FILE` or `--config=FILE` off."""
    rest, path, waiting = [], None, False
    for argument in arguments:
        if waiting or argument.startswith("--config="):
            path, waiting = Path(argument.removeprefix("--config=")), False
        elif argument == "--config":
            waiting = True
        else:
            rest.append(argument)
    if waiting:
        raise ValueError("--config is followed by a file, got nothing: write --config FILE.toml")
    return rest, path


def _from_toml(kind: type, path: Path) -> list[str]:
    """Returns the arguments that a TOML file stands for, so that one parser checks all types."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"a configuration is TOML, got {str(path)!r} ({error}): mend it") from error
    known = {field.name for field in fields(kind)}
    arguments = []
    for key, value in values.items():
        if key not in known:
            raise ValueError(
                f"a key of {path.name} is one of {', '.join(sorted(known))}, got {key!r}: "
                f"did you mean {nearest(key, known)!r}?"
            )
        arguments += _argument(key, value)
    return arguments


def _argument(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
