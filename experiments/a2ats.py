"""A²ATS: how well it ranks the tokens of real models, what it loses, and how fast it is.

usage: python -m experiments.a2ats recall     the true top tokens that each way to rank finds
       python -m experiments.a2ats distances  what ranking all tokens as if equally far away finds, by how far
       python -m experiments.a2ats quality    against Quest and SnapKV, which read as many bytes a step
       python -m experiments.a2ats speed      K and V on the host against the full cache on the device
       python -m experiments.a2ats hits       rows that lie on the device from earlier steps, by how many may
       python -m experiments.a2ats reads      what places of host memory take, by how far they spread

Each stores its rows; the same command goes on from there, and prints them again.
"""

import sys
from collections.abc import Sequence

from experiments import command
from experiments.a2ats_distances import Distances, distances
from experiments.a2ats_hits import Hits, hits
from experiments.a2ats_quality import Quality, quality
from experiments.a2ats_recall import Recall, recall
from experiments.a2ats_speed import Speed, speed
from experiments.host_reads import Reads, reads

__all__ = ["main"]

_COMMANDS: command.Commands = {
    "recall": (Recall, recall), "distances": (Distances, distances), "quality": (Quality, quality),
    "speed": (Speed, speed), "hits": (Hits, hits), "reads": (Reads, reads),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `command.run`."""
    return command.run(_COMMANDS, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
