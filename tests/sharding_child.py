"""Runs methods on one device and spread over several, and prints how far they are apart: a JSON line a case.

Run by unit/test_sharding.py, where XLA makes eight devices of one CPU.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from method_cases import codebooks
from tiny_models import tiny

import kvjax
from kvjax import decoding, measure, sharding
from kvjax.method import Chain
from kvjax.methods import METHODS, make
from kvjax.program import Program

BUDGET, N_DEVICES, N_NEW = 40, 4, 4
RNG = np.random.default_rng(0)
PROMPTS = kvjax.pad([RNG.permutation(256)[:n].tolist() for n in (60, 47)])
FORCED = RNG.integers(0, 256, (2, N_NEW)).astype(np.int32)


MODEL, WINDOWS = (tiny(n_kv_heads=4, windows=w) for w in ((None,), (16, None)))


def settings(name: str) -> dict:
    known = METHODS[name].__dataclass_fields__
    given = {"budget": BUDGET, "dense_layers": 0}
    if name == "a2ats":
        given = {"topk": 9, "calibration": codebooks(MODEL), "far": 64, "window": 8}
    return {k: v for k, v in given.items() if k in known}


def cases() -> dict:
    found = {name: make(name, **settings(name)) for name in METHODS}
    table = np.full((1, 4), BUDGET)
    return found | {
        "snapkv+kivi4": kvjax.chain(found["snapkv"], make("kivi", bits=4)),
        "quest+kivi8": kvjax.chain(found["quest"], make("kivi", bits=8)),
        "a2ats, other codebooks": make("a2ats", **settings("a2ats") | {"calibration": codebooks(MODEL, 1)}),
        "snapkv, equal table": make("snapkv", budget=table),
        "snapkv, other table": make("snapkv", budget=table + np.array([0, 0, 0, 1])),
    }


def run(model, method, **options):
    first, state = kvjax.prefill(model, PROMPTS, method, room=N_NEW, **options)
    if model.config.n_layers > 1:
        _, last, state, kept = kvjax.decode(model, first, state, method, FORCED, keep_logits=True)
        return np.concatenate([np.asarray(kept), np.asarray(last)[:, None]], axis=1), state
    logits = [np.asarray(first)]
    for ids in FORCED.T:  # single steps compile faster than the loop that draws tokens
        last, state = kvjax.decode_step(model, ids, state, method)
        logits.append(np.asarray(last))
    return np.stack(logits, axis=1), state


def compare(model, spread, method, **options) -> dict:
    expected, _ = run(model, method, **options)
    ours, state = run(spread, method, **options)
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    found = {"error": float(np.abs(ours - expected).max()), "share": own / measure.nbytes(state)}
    if isinstance(method, Chain):  # the step of one composed method stands for all
        program, ids = Program.of(spread, method), jnp.zeros((2, 1), jnp.int32)
        step = decoding._step.lower(spread.variables, ids, ids, state, program=program).compile()
        gathers = sum(f"all-{word}(" in step.as_text() for word in ("gather", "to-all"))
        found |= {"aliased": step.memory_analysis().alias_size_in_bytes / own, "gathers": gathers}
    return found


def main() -> None:
    model, windows = MODEL, WINDOWS
    four, two = (sharding.make_mesh(jax.devices()[:n]) for n in (N_DEVICES, 2))
    wanted = [(name, model, four, method, {}) for name, method in cases().items()]
    wanted += [
        ("window", windows, four, make("full"), {}),
        ("h2o by chunks", model, two, make("h2o", budget=BUDGET), {"compress": "chunk", "chunk": 32}),
    ]
    for name, one, mesh, method, options in wanted:
        try:
            found = compare(one, sharding.shard(one, mesh), method, **options)
        except ValueError as error:
            found = {"refused": str(error)}
        print(json.dumps({"name": name, "couples": method.couples_heads} | found), flush=True)


if __name__ == "__main__":
    main()
