"""LeoAM: how well chunks are ranked by their abstracts, and what reading few of them loses.

usage: python -m experiments.leoam recall     attention that chunks catch, for the bytes that are read
       python -m experiments.leoam quality    against methods that read as many bytes a step
       python -m experiments.leoam speed      steps of contexts on a disk, within small budgets
       python -m experiments.leoam reads      what steps read from a disk, by the tokens of a chunk
       python -m experiments.leoam faults     what is left when a process, a disk or a file fails

Each stores its rows; the same command goes on from there, and prints them again.
"""

import sys
from collections.abc import Sequence

from experiments import command
from experiments.leoam_faults import Faults, faults
from experiments.leoam_quality import Quality, quality
from experiments.leoam_reads import Reads, reads
from experiments.leoam_recall import Recall, recall
from experiments.leoam_speed import Speed, speed

__all__ = ["main"]

_COMMANDS: command.Commands = {
    "recall": (Recall, recall),
    "quality": (Quality, quality),
    "speed": (Speed, speed),
    "reads": (Reads, reads),
    "faults": (Faults, faults),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `command.run`."""
    return command.run(_COMMANDS, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
