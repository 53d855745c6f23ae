"""Kills a process whose rows lie on a disk at random moments, and looks at what it left.

Nothing that it called sealed or saved may be lost or changed: recovered rows and opened saves are compared
with those of a process that nothing disturbed, bit by bit. Two such give the same, or nothing is compared.
The machine goes on, so what was written is there whether it was synced or not; a power cut is not tried.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import kvjax
from experiments import leoam_fault_child as child
from experiments import provenance
from kvjax.contexts import load_context, recover_context
from kvjax.methods.leoam import LeoAM

__all__ = ["Kills", "run"]

Row = dict[str, Any]


@dataclass(eq=False)
class Kills:
    """Kills, and what they are compared with.

    Args:
        settings: `experiments.leoam_faults.Faults`.
        folder: of all that is written.
    """

    settings: Any
    folder: Path

    def each(self) -> Iterator[tuple[str, str, Callable[[], Row]]]:
        """Yields every fault, a case of it, and what tries it."""
        for i in range(self.settings.kills):
            yield "killed", f"moment {i}", functools.partial(self.killed, i)

    @functools.cached_property
    def reference(self) -> SimpleNamespace:
        """What an undisturbed process saves, its rows, and its seconds after the first line."""
        runs = []
        for name in ("first", "second"):
            (rows := self.folder / name).mkdir()
            lines, seconds = run(self.settings, self.folder, rows=str(rows))
            arrays = [np.load(rows / f"{i}.npy") for i in range(len(list(rows.iterdir())))]
            runs.append((lines, arrays, seconds))
        (lines, rows, first), (others, again, second) = runs
        n = self.settings.prompt + self.settings.steps
        if lines != others or not child.same(rows, again, [n - child.PADDED, n]):
            raise RuntimeError("a process gives the same bits each time, got others: nothing can be compared")
        digests = [line["digest"] for line in lines if line["phase"] == "save"]
        return SimpleNamespace(rows=rows, seconds=min(first, second), digests=digests)

    def killed(self, number: int) -> Row:
        """Kills the process at a moment, and looks at what it left."""
        share = float(np.random.default_rng([self.settings.seed, number]).uniform())
        lines, _ = run(self.settings, self.folder, share * self.reference.seconds)
        last, model = lines[-1], child.model_of(self.settings.seed)
        method = child.method_on(self.folder / "killed")
        recovered, lost = self._recovered(model, method, last)
        opened, wrong = self._opened(model, method, last)
        found = {"moment": share, "sealed": last["sealed"], "recovered": recovered, "saves": last["saves"]}
        said = f"{recovered} tokens found of {last['sealed']} sealed, save {opened} opened of {last['saves']}"
        problems = [*lost, *wrong]
        return {
            "place": last["phase"], "outcome": "; ".join([said, *problems]), "survived": not problems,
            "opened": opened, **found,
        }  # fmt: skip

    def _recovered(self, model: kvjax.Model, method: LeoAM, last: Row) -> tuple[list[int] | None, list[str]]:
        """Returns how many tokens are found that were not saved, and what is wrong with them."""
        try:
            state = recover_context(method.folder, model, method).state
        except FileNotFoundError as error:
            return None, [] if last["sealed"] is None else [f"sealed tokens are found, got {error}"]
        seen, problems = np.asarray(state[0].seen).tolist(), []
        if any(n < least for n, least in zip(seen, last["sealed"] or [0, 0], strict=True)):
            problems.append("sealed tokens are lost")
        if not child.same(child.rows(state), self.reference.rows, seen):
            problems.append("rows are changed")
        return seen, problems

    def _opened(self, model: kvjax.Model, method: LeoAM, last: Row) -> tuple[int | None, list[str]]:
        """Returns which save is opened, counted from 1, and what is wrong with it."""
        saves, may = last["saves"], {last["saves"], last["saves"] + (last["phase"] == "save")}
        try:
            state = load_context(method.folder, model, method).state
        except FileNotFoundError as error:
            return None, [f"a save is opened, got {error}"] if saves else []
        digest, all_of = child.digest(state), self.reference.digests
        which = all_of.index(digest) + 1 if digest in all_of else None
        problems = [] if which in may else [f"the newest save is opened, got {which} after {saves}"]
        if not child.same(child.rows(state), self.reference.rows, np.asarray(state[0].seen).tolist()):
            problems.append("rows of the save are changed")
        return which, problems


def run(settings: Any, below: Path, after: float | None = None, **more: Any) -> tuple[list[Row], float]:
    """Runs the process, with its rows in a new folder, `killed`.

    Args:
        after: seconds after its first line when it is killed; None for never.
        more: of its request.

    Returns: its lines, and the seconds from its first line to its last.

    Raises:
        RuntimeError: where it ends by itself otherwise than it should.
    """
    shutil.rmtree(below / "killed", ignore_errors=True)
    asked = {name: getattr(settings, name) for name in ("prompt", "steps", "seed")}
    command = [
        sys.executable,
        "-m",
        child.__name__,
        json.dumps(asked | {"folder": str(below / "killed")} | more),
    ]
    path = os.pathsep.join([str(provenance.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        open(below / "errors", "w+") as errors,
        subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=errors,
            stdin=subprocess.DEVNULL if after is None else subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        ) as process,
    ):  # fmt: skip
        lines, started, seconds = [process.stdout.readline()], time.perf_counter(), 0.0
        if after is not None and lines[0]:
            time.sleep(after)
            process.kill()
        for line in process.stdout:
            lines.append(line)
            seconds = time.perf_counter() - started
        if process.wait() not in (0, -9):
            errors.seek(0)
            raise RuntimeError(f"the process runs until it is killed, got {errors.read()[-2000:]}")
    return [json.loads(line) for line in lines if line.endswith("\n")], seconds
