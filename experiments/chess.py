"""Activation sparsity on real models and at full speed: what CATS, TEAL, CHESS and CHESS+ cost and save.

usage: python -m experiments.chess quality   KL, perplexity and measured sparsity at equal sparsity
       python -m experiments.chess together  what is lost with cache methods beside
       python -m experiments.chess choices   multiple choice, zero-shot, from files of questions
       python -m experiments.chess speed     decode steps on this device, alone and with cache methods

Each stores a row as soon as it is measured: the same command goes on from there. A picture lies beside the
figures.
"""

import sys
from collections.abc import Sequence

from experiments import command
from experiments.chess_choices import Choices, score
from experiments.chess_quality import Quality, quality
from experiments.chess_speed import Speed, speed
from experiments.chess_together import Together, together

__all__ = ["main"]

_COMMANDS: command.Commands = {
    "quality": (Quality, quality),
    "together": (Together, together),
    "choices": (Choices, score),
    "speed": (Speed, speed),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `command.run`."""
    return command.run(_COMMANDS, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
