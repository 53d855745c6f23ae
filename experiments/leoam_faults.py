"""What becomes of rows on a disk when a process, the disk or a file fails: a row of results for each fault.

    killed              a process that reads a prompt, decodes and saves, at a random moment
    flipped             a bit in each kind of block, and in manifests
    disk full           after some blocks of a prompt, of steps, or of a save; or before the prompt
    short read          reads give nothing, or a part, or a page at a time
    read error          reads fail
    slow disk           reads wait
    two processes       another one wants the folder
    refused folder      one that cannot be made, or written to

A fault is survived if nothing that was sealed or saved is lost or changed, damage is named instead of read,
and no step gives other logits than without the fault. `outcome` says what came of it.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import leoam_fault_child as child
from experiments import results
from experiments.leoam_fault_disk import DiskFaults
from experiments.leoam_fault_kills import Kills
from experiments.rows import start
from kvjax import disk

__all__ = ["Faults", "faults", "outcome"]

_LENGTHS = {"prompt": child.PIECE, "steps": child.CALL}


@dataclass(frozen=True)
class Faults:
    """What to try.

    Args:
        kills: processes that are killed.
        prompt: tokens that they read, a multiple of 32.
        steps: that they take, a multiple of 16.
        seed: of weights, prompts, and where and when faults are.
        out: the folder of results.
    """

    kills: int = 50
    prompt: int = 384
    steps: int = 128
    seed: int = 0
    out: Path = results.FOLDER


def faults(settings: Faults) -> int:
    """Tries what is not stored yet, prints a line a fault, claims the counts; 1 where one is not survived.

    Raises:
        ValueError: for a prompt or steps that calls do not divide.
        RuntimeError: where the process that is to be killed does not run, or gives other rows each time.
    """
    for name, multiple in _LENGTHS.items():
        if (n := getattr(settings, name)) < 2 * multiple or n % multiple:
            raise ValueError(
                f"{name} are calls of {multiple} tokens, two or more, got {n}: take a multiple of {multiple}"
            )
    stored, survived = start("leoam", "faults", settings), []
    with tempfile.TemporaryDirectory(prefix="leoam-faults-") as name:
        folder = Path(name).resolve()
        for group in (Kills(settings, folder), DiskFaults(settings, folder)):
            for fault, case, run in group.each():
                row = {"fault": fault, "case": case}
                if stored.find(row) is None:
                    group.reference  # noqa: B018  what is compared with is made, or this ends here
                    stored = stored.add(row, outcome(run, folder))
                found = stored.find(row)
                survived.append(found["survived"])
                words = ("survived" if survived[-1] else "NOT SURVIVED", fault, case)
                print(*words, found["place"], found["outcome"], sep=" | ", flush=True)
    claims = {"leoam.faults_tried": len(survived), "leoam.faults_survived": sum(survived)}
    stored = stored.claim(claims)
    print(*(f"{name} {n}" for name, n in claims.items()), stored.path, sep="\n")
    return int(not all(survived))


def outcome(run: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Returns the values of a row; what a fault does that nobody expected is no survival.

    folder: of all that is written, which is not named in them.
    """
    try:
        found = run()
    except Exception as error:  # whatever it is, it is the outcome
        found = {"place": "", "outcome": f"{type(error).__name__}: {error}", "survived": False}
    finally:
        for one in [x for x in disk.Disk.by_folder.values() if x.folder.is_relative_to(folder)]:
            one.close()
    return found | {"outcome": " ".join(found["outcome"].replace(f"{folder}/", "").split())}
