"""Compares kvjax with transformers on torch: prefill and greedy decode on one machine, in turns.

usage: python -m experiments.peers [--peer-python .venv/3.11-peer/bin/python]

Both libraries run SmolLM2 from the same GGUF file in float32, each in a process of its own with
the same number of threads. Runs alternate (ours, theirs, ours, ...), so that a machine that slows
down slows down both; medians are compared. The greedy tokens and the prompt's last logits must
agree, or the faster one may be so because it is wrong.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import tyro

from experiments import results
from kvjax.models import hub
from kvjax.models.tokenizer import load_tokenizer

CHILD = Path(__file__).parent / "peer_child.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(CHILD.parent.parent)}
SIDES = ("kvjax", "torch")
LOGIT_TOLERANCE = 2e-4
LOAD_LIMIT = 0.7


@dataclass(frozen=True)
class Settings:
    """What to compare.

    peer_python: a Python that has torch and transformers, by default this one (`make peers`).
    n_prompt, n_new: tokens prefilled, tokens decoded after them. n_runs: runs of each side.
    busy: measure although other processes use the machine.
    """

    peer_python: str = sys.executable
    model: str = "smollm2-135m"
    n_prompt: int = 2048
    n_new: int = 64
    n_runs: int = 7
    n_threads: int = 2
    busy: bool = False


class Child:
    """A process that runs one library on request."""

    def __init__(self, side: str, python: str, request: dict, folder: Path):
        """Starts the process; `ready` waits for it."""
        self.side = side
        self.logits = folder / f"{side}.npy"
        command = [python, str(CHILD), side]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT)
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


def measure(children: dict[str, Child], n_runs: int) -> dict[str, list[dict]]:
    """Returns each side's runs, made in turns."""
    runs = {side: [] for side in children}
    for index in range(n_runs):
        for side, child in children.items():
            runs[side].append(child.run())
            prefill_s, decode_s = (runs[side][-1][name] for name in ("prefill_s", "decode_s"))
            print(f"run {index + 1}/{n_runs} {side}: prefill {prefill_s:.2f} s, decode {decode_s:.2f} s")
    return runs


def load_average(busy: bool) -> float | None:
    """Returns how many processes wanted a core in the last minute, None where nobody counts them.

    Raises:
        RuntimeError: where others use the machine, unless busy is allowed.
    """
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load > LOAD_LIMIT and not busy:
        raise RuntimeError(
            f"both sides have the cores to themselves (torch's threads wait for each other and suffer most), "
            f"got {load=:.2f} over {LOAD_LIMIT}: wait a minute, or allow it with --busy"
        )
    return load


def compared(runs: dict[str, list[dict]], name: str) -> dict:
    """Returns median and single times of one quantity, ours and theirs; core_us sums over cores."""
    times = {side: [round(1e6 * run[f"{name}_s"]) for run in runs[side]] for side in SIDES}
    ours, theirs = (statistics.median(times[side]) for side in SIDES)
    cores = {side: statistics.median(1e6 * run[f"{name}_core_s"] for run in runs[side]) for side in SIDES}
    return {
        "impl": "kvjax",
        "time_us": ours,
        "peer": "transformers",
        "peer_us": theirs,
        "speedup": theirs / ours,
        "runs_us": times["kvjax"],
        "peer_runs_us": times["torch"],
        "core_us": cores["kvjax"],
        "peer_core_us": cores["torch"],
    }


def agreement(children: dict[str, Child], runs: dict[str, list[dict]]) -> dict:
    """Returns how far the logits are apart and how many greedy tokens agree.

    Raises:
        RuntimeError: where the two sides compute different things.
    """
    ours, theirs = (np.load(children[side].logits) for side in SIDES)
    error = float(np.abs(ours - theirs).max())
    ids = [runs[side][-1]["ids"] for side in SIDES]
    differ = [a != b for a, b in zip(*ids, strict=True)]
    if not error < LOGIT_TOLERANCE:
        raise RuntimeError(
            f"both sides give the same logits within {LOGIT_TOLERANCE}, got {error=}: times mean nothing"
        )
    return {"error": error, "tokens_agreeing": differ.index(True) if any(differ) else len(differ)}


def main(settings: Settings):
    """Measures, prints and stores."""
    load = load_average(settings.busy)
    path = hub.fetch(settings.model)
    request = {
        "model": str(path),
        "ids": prompt_ids(path, settings.n_prompt),
        "n_new": settings.n_new,
        "n_threads": settings.n_threads,
    }
    stored = results.start("peers", seed=0, resume=False, command="python -m experiments.peers")
    pythons = {"kvjax": sys.executable, "torch": settings.peer_python}
    with tempfile.TemporaryDirectory() as folder:
        children = {side: Child(side, pythons[side], request, Path(folder)) for side in SIDES}
        try:
            ready = {side: child.ready() for side, child in children.items()}
            runs = measure(children, settings.n_runs)
            agree = agreement(children, runs)
        finally:
            for child in children.values():
                child.close()
    lengths = f"{settings.n_prompt} tokens then {settings.n_new}"
    spec = f"{settings.model} float32 B1, {lengths}, {settings.n_threads} threads"
    shared = agree | {"load_average": load, "ready": ready}
    claims = {}
    for name in ("prefill", "decode"):
        row = compared(runs, name) | shared
        stored = stored.add({"name": name, "spec": spec}, row)
        claims[f"{name}_speedup"] = row["speedup"]
        ours_s, theirs_s = row["time_us"] / 1e6, row["peer_us"] / 1e6
        print(f"{name}: kvjax {ours_s:.3f} s, transformers {theirs_s:.3f} s, {row['speedup']:.2f}x")
    stored.claim(claims)
    print(f"agreement: {agree}; stored in {stored.path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
