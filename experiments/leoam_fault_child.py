"""Generates with rows on a disk and says before each program what is on it for sure, until it is killed.

usage: python -m experiments.leoam_fault_child '{"folder": "F", "prompt": 384, "steps": 128, "seed": 0}'

A JSON line a program: what comes next (`phase`), the tokens of each row whose chunks were synced, the saves
that are done, and before a save a digest of what it keeps. All programs have been compiled, and have run once
in a folder beside, before the first line. After the last one it writes the rows of each layer to `rows`, if
that names a folder, and waits for the end of its input. `experiments.leoam_fault_kills` runs it.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import Int

import kvjax
from experiments import decode_model
from kvjax import disk
from kvjax.contexts import save_context
from kvjax.methods.leoam import LeoAM
from kvjax.model import Model, keep_compiled
from kvjax.states import State

__all__ = ["digest", "generate", "main", "method_on", "model_of", "prompts", "rows", "same", "sealed"]

PIECE, CALL = 32, 16  # tokens of a prompt that are read, and steps that are taken, in one call
_HOST = 2**20  # bytes of chunks in memory: about a tenth of all
PADDED = 9  # tokens that row 0 has less, so that chunks of rows get full at other times


def main(request: str) -> None:
    """Runs one generation."""
    asked = json.loads(request)
    folder, steps, saves = Path(asked["folder"]), asked["steps"], []
    model, ids = model_of(asked["seed"]), prompts(asked["prompt"], asked["seed"])
    total = ids.shape[1] + steps
    warm = method_on(folder.with_name(folder.name + "-warm"))
    generate(model, warm, ids[:, : 2 * PIECE], min(2 * CALL, steps), total, lambda *_: None)

    def say(phase: str, state: State | None) -> None:
        tokens = None if state is None else sealed(state)
        line = {"phase": phase, "sealed": tokens, "saves": len(saves)}
        if phase == "save":
            saves.append(digest(state))
            line["digest"] = saves[-1]
        print(json.dumps(line), flush=True)

    print(json.dumps({"phase": "start", "sealed": None, "saves": 0}), flush=True)
    state = generate(model, method_on(folder), ids, steps, total, say)
    if asked.get("rows"):
        for i, x in enumerate(rows(state)):
            np.save(Path(asked["rows"]) / f"{i}.npy", x)
    sys.stdin.read()


def generate(
    model: Model, method: LeoAM, ids: Int[np.ndarray, "B T"], steps: int, total: int, say: Callable
) -> State:
    """Reads a prompt in pieces and decodes greedily in calls, with a save after the prompt and every call.

    Args:
        total: slots of a row.
        say: is given what comes next, and the state as it is.
    """
    state = None
    for start in range(0, ids.shape[1], PIECE):
        say("prompt", state)
        piece = ids[:, start : start + PIECE]
        logits, state = kvjax.prefill(
            model, piece, method, room=total - start - piece.shape[1], chunk=PIECE, state=state
        )
    for _ in range(0, steps, CALL):
        _saved(model, method, state, say)
        say("decoding", state)
        _, logits, state, _ = kvjax.decode(model, logits, state, method, np.full((len(ids), CALL), -1))
    _saved(model, method, state, say)
    say("end", state)
    return state


def _saved(model: Model, method: LeoAM, state: State, say: Callable) -> None:
    say("save", state)
    save_context(method.folder, model, method, state)


def model_of(seed: int, dtype: Any = jnp.bfloat16) -> Model:
    """Returns a small model with random weights, whose programs are kept from one process to the next."""
    keep_compiled()
    model = decode_model.random("tiny", decode_model.config_of("tiny"), seed)
    params = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, model.params)
    return Model(model.name, model.config, params, None, jnp.dtype(dtype))


def method_on(folder: Path, **more: Any) -> LeoAM:
    """Returns a method whose rows lie in a folder."""
    sizes = {"topk": 0.2, "leaf": 8, "root": 32, "chunk": 16, "host_budget": _HOST}
    return LeoAM(**sizes | more, disk=str(folder))


def prompts(n: int, seed: int) -> Int[np.ndarray, "B T"]:
    """Returns two prompts of up to n tokens."""
    ids = np.random.default_rng(seed).integers(0, decode_model.SHAPES["tiny"]["vocab_size"], (2, n))
    ids[0, :PADDED] = -1
    return ids.astype(np.int32)


def sealed(state: State) -> list[int]:
    """Waits for the disk, and returns how many tokens of each row lie there in whole chunks of all layers."""
    own = disk.Disk.of(state)
    own.sync()
    ends = [store.end.min(1) // store.layout.chunk * store.layout.chunk for store in own.stores.values()]
    return np.min(ends, axis=0).tolist()


def digest(state: State) -> str:
    """Returns a digest of all that a save keeps of a state beside its whole chunks."""
    found, own = xxhash.xxh3_64(), disk.Disk.of(state)
    for i, kv in enumerate(state):
        for x in (*jax.tree.leaves(kv.replace(tier=None)), own.stores[i].end, own.stores[i].tail):
            found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()


def rows(state: State) -> list[np.ndarray]:
    """Returns K and V of each layer on the disk, [B K S 2 D], as numbers that compare as their bits do."""
    found = [store.everything() for store in disk.Disk.of(state).stores.values()]
    return [x.view(f"u{x.dtype.itemsize}") for x in found]


def same(found: Sequence[np.ndarray], others: Sequence[np.ndarray], seen: Sequence[int]) -> bool:
    """Returns whether so many first rows of each prompt are alike in all layers."""
    pairs = [
        (a[i, :, :n], b[i, :, :n]) for a, b in zip(found, others, strict=True) for i, n in enumerate(seen)
    ]
    return all(np.array_equal(a, b) for a, b in pairs)


if __name__ == "__main__":
    main(sys.argv[1])
