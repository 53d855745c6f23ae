"""Searches the settings of kernels on this device and stores the best: `python -m pallas_kernels.tune`.

For every spec that is to be tuned, settings that differ in one field from the best so far are
tried until none is better by more than the noise. What wins is written to
`<op>/tuned/<device>.json`, which `tuning.settings` reads; a case that was tuned before is replaced.

Usage: python -m pallas_kernels.tune [OP ...]
"""

import dataclasses
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import jax

from pallas_kernels import backend, tuning
from pallas_kernels.op import Op, Spec
from pallas_kernels.registry import ops
from pallas_kernels.timing import input_sets, layers, race

__all__ = ["main", "search", "store", "tune"]


def search(
    candidates: Sequence[Any], start: Any, costs: Callable[[Sequence[Any]], Sequence[float]]
) -> tuple[Any, dict[Any, float]]:
    """Returns the cheapest settings found by changing one field at a time, and the cost of all tried.

    Args:
        costs: returns what each of several settings costs.

    Example:
        >>> from collections import namedtuple
        >>> @dataclasses.dataclass(frozen=True)
        ... class Settings:
        ...     block: int
        ...     warps: int
        >>> space = [Settings(b, w) for b in (16, 32, 64) for w in (2, 4, 8)]
        >>> costs = lambda tried: [abs(s.block - 64) + abs(s.warps - 4) for s in tried]
        >>> best, tried = search(space, Settings(16, 2), costs)
        >>> best, tried[best], len(tried)
        (Settings(block=64, warps=4), 0, 8)
    """
    known, best = {}, start
    while True:
        near = [c for c in candidates if c not in known and _distance(c, best) == 1]
        near = near if known else [start, *near]
        known |= dict(zip(near, costs(near), strict=True))
        cheapest = min(known, key=known.get)
        if cheapest == best or not near:
            return cheapest, known
        best = cheapest


def _distance(a: Any, b: Any) -> int:
    return sum(getattr(a, f.name) != getattr(b, f.name) for f in dataclasses.fields(a))


def tune(op: Op, spec: Spec, samples: int = 5) -> dict[str, Any] | None:
    """Returns the row to store for one case, or None where it has no settings to choose."""
    impl, at = backend.target().platform, backend.target()
    call = lambda x: op.call(**x, **spec.options(), impl=impl)  # noqa: E731
    with tuning.watch() as asked:
        jax.eval_shape(call, jax.eval_shape(spec.arrays, jax.random.key(0)))
    candidates = [c for c in op.candidates(spec) if type(c) is type(asked.get(op.name, (None, None))[0])]
    if not candidates:
        return None
    start, key = asked[op.name]
    sets = input_sets(spec)

    def program(chosen: Any) -> Any:
        """Compiles the case with these settings; None where they do not run."""
        try:
            with backend.aim(at), tuning.force(op.name, chosen):
                return layers(call, sets)
        except (jax.errors.JaxRuntimeError, NotImplementedError):  # too much shared memory, say
            return None

    def cost(run: Any) -> float:
        try:
            return race({"": (run, sets)}, samples)[""][0]
        except jax.errors.JaxRuntimeError:
            return math.inf

    def costs(tried: Sequence[Any]) -> list[float]:
        with ThreadPoolExecutor() as pool:  # compilers leave Python alone
            programs = list(pool.map(program, tried))
        return [math.inf if run is None else cost(run) for run in programs]

    best, tried = search(candidates, start, costs)
    return {
        "key": key, "settings": dataclasses.asdict(best), "spec": spec.name, "time_us": round(tried[best], 2),
        "default_us": round(tried[start], 2), "tried": len(tried),
    }  # fmt: skip


def store(op: str, device: str, row: dict[str, Any]) -> None:
    """Writes a row beside those of other cases."""
    path = tuning.path(op, device)
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [r for r in old if r["key"] != row["key"]] + [row]
    path.parent.mkdir(exist_ok=True)
    made = {"jax": importlib.metadata.version("jax"), "date": datetime.now(UTC).date().isoformat()}
    text = json.dumps({"device": device, **made, "rows": rows}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    tuning.forget()


def main(names: Sequence[str]) -> int:
    """Tunes the named ops, or all."""
    at = backend.target()
    if at.platform == "cpu":
        print("error: kernels are tuned on a GPU or TPU, got platform 'cpu'", file=sys.stderr)
        return 2
    if unknown := set(names) - ops().keys():
        print(f"error: an op is one of {', '.join(ops())}, got {sorted(unknown)}", file=sys.stderr)
        return 2
    for name, op in ops().items():
        for spec in op.specs if not names or name in names else ():
            if "tune" in spec.uses and (row := tune(op, spec)):
                store(name, at.device, row)
                print(
                    f"{name} {spec.name}: {row['default_us']} -> {row['time_us']} us, {row['settings']}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
