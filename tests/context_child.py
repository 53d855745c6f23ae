"""Kills writers of a context at 50 places, and prints how often the old and the new one was left.

Run by unit/test_contexts.py in a process of its own, since it forks.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from method_cases import MODELS

import kvjax
from kvjax import context_layers, contexts

PLACES = 50
MODEL, FULL = MODELS["G2"], kvjax.METHODS["full"]()


def state(seed):
    ids = np.random.default_rng(seed).integers(0, 90, (1, 24)).astype(np.int32)
    return jax.tree.map(
        np.asarray, kvjax.prefill(MODEL, ids, FULL, room=2)[1]
    )  # a fork has no threads of JAX


def calls(limit):
    """Counts what reaches the disk, and ends the process at call `limit`."""
    n = 0

    def counted(call):
        def run(*args, **options):
            nonlocal n
            n += 1
            if n == limit:
                os._exit(9)
            return call(*args, **options)

        return run

    for name in ("pwrite", "fsync", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    return lambda: n


def main(folder):
    context_layers._BLOCK_BYTES = 1000
    contexts.fingerprint = lambda model: "a model"
    old, new = state(0), state(1)
    whole = [np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(s)]) for s in (old, new)]
    child = os.fork()
    if not child:  # how many calls a save takes
        contexts.save_context(folder / "counted", MODEL, FULL, old)
        count = calls(-1)
        contexts.save_context(folder / "counted", MODEL, FULL, new)
        (folder / "n").write_text(str(count()))
        os._exit(0)
    os.waitpid(child, 0)
    total = int((folder / "n").read_text())
    found = {"killed": 0, "old": 0, "new": 0}
    for i, limit in enumerate(np.linspace(1, total, PLACES).astype(int)):
        place = folder / str(i)
        contexts.save_context(place, MODEL, FULL, old)
        if not (child := os.fork()):
            calls(limit)
            contexts.save_context(place, MODEL, FULL, new)
            os._exit(0)
        found["killed"] += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        left = contexts.load_context(place, MODEL, FULL).state
        left = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(left)])
        found["old"] += np.array_equal(left, whole[0])
        found["new"] += np.array_equal(left, whole[1])
    print(json.dumps({k: int(v) for k, v in found.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
