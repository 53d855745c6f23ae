"""Compares kvjax with transformers on torch: prefill and greedy decode on one machine, in turns.

usage: python -m experiments.peers [--peer-python .venv/3.11-peer/bin/python]

Both libraries run SmolLM2 from the same GGUF file in float32, each in a process of its own with
the same number of threads. Runs alternate (ours, theirs, ours, ...), so that a machine that slows
down slows down both; medians are compared. The greedy tokens and the prompt's last logits must
agree, or the faster one may be so because it is wrong.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import tyro

import kvjax
from experiments import results
from kvjax.models import hub
from kvjax.models.tokenizer import load_tokenizer

CHILD = Path(__file__).parent / "peer_child.py"
SIDES = ("kvjax", "torch")
LOGIT_TOLERANCE = 2e-4


@dataclass(frozen=True)
class Settings:
    """What to compare.

    peer_python: a Python that has torch and transformers, by default this one (`make peers`).
    n_prompt, n_new: tokens prefilled, tokens decoded after them. n_runs: runs of each side.
    """

    peer_python: str = sys.executable
    model: str = "smollm2-135m"
    n_prompt: int = 2048
    n_new: int = 64
    n_runs: int = 7
    n_threads: int = 2


class Child:
    """A process that runs one library on request."""

    def __init__(self, side: str, python: str, request: dict, folder: Path):
        """Starts the process; `ready` waits for it."""
        self.side = side
        self.logits = folder / f"{side}.npy"
        self.process = subprocess.Popen(
            [python, str(CHILD), side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.request = request | {"logits": str(self.logits)}

    def ready(self) -> dict:
        """Loads the model and warms up; returns versions and seconds."""
        return self._ask(json.dumps(self.request))

    def run(self) -> dict:
        """Runs once more; returns seconds and greedy ids."""
        return self._ask("run")

    def close(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, line: str) -> dict:
        """Sends a line and returns the reply.

        Raises:
            RuntimeError: where the process has died.
        """
        try:
            print(line, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise RuntimeError(
                f"a side answers each request, got none from {self.side!r}: see what it printed above"
            ) from error


def prompt_ids(path: Path, n_prompt: int) -> list[int]:
    """Returns the first n_prompt tokens of Python's reference prose."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return load_tokenizer(path).encode(text[: 12 * n_prompt])[:n_prompt]
