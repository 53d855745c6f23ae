"""A²ATS: how well it ranks the tokens of real models, what it loses, and how fast it is.

usage: python -m experiments.a2ats recall     the true top tokens that each way to rank finds
       python -m experiments.a2ats quality    against Quest and SnapKV, which read as many bytes a step
       python -m experiments.a2ats speed      K and V on the host against the full cache on the device

Each stores its rows; the same command goes on from there, and prints them again.
"""

import sys
from collections.abc import Sequence

from experiments import command
from experiments.a2ats_quality import Quality, quality
from experiments.a2ats_recall import Recall, recall
from experiments.a2ats_speed import Speed, speed

__all__ = ["main"]

_COMMANDS: command.Commands = {
    "recall": (Recall, recall), "quality": (Quality, quality), "speed": (Speed, speed),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `command.run`."""
    return command.run(_COMMANDS, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
