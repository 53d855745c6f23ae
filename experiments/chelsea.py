"""Chelsea on real models and at full speed: which settings, how good, how fast.

usage: python -m experiments.chelsea sweep     one setting at a time beside the defaults: KL at equal slots
       python -m experiments.chelsea quality   against the methods it is compared with, at equal slots
       python -m experiments.chelsea long      decode-time clustering over thousands of tokens
       python -m experiments.chelsea speed     decode, throughput, prefill and memory on this accelerator

Each stores a row as soon as it is measured: the same command goes on from there. A picture lies beside the
figures.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from experiments import options
from experiments.chelsea_quality import Long, Quality, Sweep, long, quality, sweep
from experiments.chelsea_speed import Speed, speed

__all__ = ["main"]

_COMMANDS: Mapping[str, tuple[type, Callable[..., int]]] = {
    "sweep": (Sweep, sweep),
    "quality": (Quality, quality),
    "long": (Long, long),
    "speed": (Speed, speed),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 1 on a fault, 2 on a bad option, 130 on Ctrl-C."""
    console, arguments = Console(stderr=True), sys.argv[1:] if arguments is None else list(arguments)
    try:
        name = arguments[0] if arguments else ""
        if name not in _COMMANDS:
            raise ValueError(f"a command is one of {', '.join(_COMMANDS)}, got {name!r}")
        kind, run = _COMMANDS[name]
        return run(options.parse(kind, arguments[1:], __doc__))
    except ValueError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except (OSError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from there.", highlight=False, markup=False)
        return 130


if __name__ == "__main__":
    sys.exit(main())
