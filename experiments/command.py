"""Runs an experiment that has several commands, and turns faults into a line and an exit code."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from experiments import options

__all__ = ["Commands", "run"]

Commands = Mapping[str, tuple[type, Callable[[Any], int]]]  # a name's options, and what runs them


def run(commands: Commands, arguments: Sequence[str] | None, description: str) -> int:
    """Runs the command that the arguments name; None takes those of the process.

    Returns: the exit code: 0, 1 on a fault, 2 on a bad option, 130 on Ctrl-C.
    """
    console, arguments = Console(stderr=True), sys.argv[1:] if arguments is None else list(arguments)
    try:
        name = arguments[0] if arguments else ""
        if name not in commands:
            raise ValueError(f"a command is one of {', '.join(commands)}, got {name!r}")
        kind, start = commands[name]
        return start(options.parse(kind, arguments[1:], description))
    except ValueError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except (OSError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from there.", highlight=False, markup=False)
        return 130
