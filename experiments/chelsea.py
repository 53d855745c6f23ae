"""Chelsea on real models and at full speed: which settings, how good, how fast.

usage: python -m experiments.chelsea sweep     one setting at a time beside the defaults: KL at equal slots
       python -m experiments.chelsea quality   against the methods it is compared with, at equal slots
       python -m experiments.chelsea long      decode-time clustering over thousands of tokens
       python -m experiments.chelsea speed     decode, throughput, prefill and memory on this accelerator

Each stores a row as soon as it is measured: the same command goes on from there. A picture lies beside the
figures.
"""

import sys
from collections.abc import Sequence

from experiments import command
from experiments.chelsea_long import Long, long
from experiments.chelsea_quality import Quality, Sweep, quality, sweep
from experiments.chelsea_speed import Speed, speed

__all__ = ["main"]

_COMMANDS: command.Commands = {
    "sweep": (Sweep, sweep),
    "quality": (Quality, quality),
    "long": (Long, long),
    "speed": (Speed, speed),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `command.run`."""
    return command.run(_COMMANDS, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
