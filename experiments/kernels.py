"""Times every kernel on this machine's accelerator: `python -m experiments.kernels` (`make kernels`).

Each line is one case: the time that its bytes need at the copy rate measured in the same run, the
median time of the kernel, their ratio, the peers' times and the error against the reference. Peers
and kernel take turns; several input sets, larger than the cache together, run in one program.

`--check` runs the test cases, which are small, odd and full of what must not be read, and prints
their errors only; so does `--interpret`, in the interpreters, on a machine without an accelerator.
"""

import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments import options, results
from experiments.kernel_claims import claims
from experiments.kernel_peers import PEERS
from pallas_kernels import backend, timing
from pallas_kernels.op import Op, Spec
from pallas_kernels.registry import ops

__all__ = ["Case", "Settings", "main", "measure", "prepare"]

_WIDTH = 190  # of the table
_LINK = "host"  # the copy rate that a case in host memory is held against


@dataclass(frozen=True)
class Settings:
    """What to time.

    Args:
        ops: which to run, all by default.
        cases: those whose name "op case" this regular expression finds.
        check: compare the test cases, compiled for this accelerator, with the references; time nothing.
        interpret: "gpu" or "tpu", to check without an accelerator.
        samples: of each program; their median counts.
        seed: of the inputs.
        out: the folder of results.
    """

    ops: tuple[str, ...] = ()
    cases: str = ""
    check: bool = False
    interpret: str | None = None
    samples: int = 15
    seed: int = 0
    out: Path = results.FOLDER


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 on a fault, 2 on a bad option."""
    console, out = Console(stderr=True), Console()
    out.width = max(out.width, _WIDTH)  # a cell cut short says nothing; a terminal wraps lines
    try:
        settings = options.parse(Settings, sys.argv[1:] if arguments is None else arguments, __doc__)
        _check(settings)
        if settings.interpret:
            rows, faults = _checked(settings)
            out.print(_table(rows, "error"))
        else:
            stored, faults = _check_here(settings) if settings.check else _timed(settings)
            out.print(_table(stored.rows, "error" if settings.check else "time"))
            out.print(str(stored.path), soft_wrap=True, highlight=False)
        for fault in faults:
            console.print(f"error: {fault}", style="red", highlight=False, markup=False)
        return min(1, len(faults))
    except ValueError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except OSError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 1


def _check(settings: Settings) -> None:
    if unknown := set(settings.ops) - ops().keys():
        raise ValueError(f"an op is one of {', '.join(ops())}, got {sorted(unknown)}")
    if not any(_chosen(settings, "test" if settings.check or settings.interpret else "bench")):
        raise ValueError(f"a case has the pattern in its name, got {settings.cases=}, which none has")
    if settings.interpret not in (None, "gpu", "tpu"):
        raise ValueError(f"kernels of gpu or tpu are interpreted, got {settings.interpret=}")
    if settings.check and settings.interpret:
        raise ValueError(
            f"kernels are compiled or interpreted, got --check and {settings.interpret=}: give one"
        )
    platform = backend.target().platform
    if settings.interpret is None and platform == "cpu":
        raise ValueError(
            "kernels are timed on a GPU or TPU, got platform 'cpu': "
            'use --interpret gpu (make kernels ARGS="--interpret gpu") to check them here'
        )


def _chosen(settings: Settings, use: str) -> Iterator[tuple[Op, Spec]]:
    """Yields the cases asked for that the accelerator has kernels for; all, where there is none."""
    platform = settings.interpret or backend.target().platform
    for name, op in ops().items():
        if not settings.ops or name in settings.ops:
            for spec in op.specs:
                if platform in ("gpu", "tpu") and not op.has_kernel(spec, platform):
                    continue
                if use in spec.uses and re.search(settings.cases, f"{name} {spec.name}"):
                    yield op, spec


def _start(experiment: str, settings: Settings) -> results.Results:
    """Begins a stored run."""
    arguments = map(shlex.quote, options.as_arguments(settings, skip=("out",)))
    command = " ".join(["python -m experiments.kernels", *arguments])
    return results.start(experiment, settings.seed, folder=settings.out, command=command)


def _check_here(settings: Settings) -> tuple[results.Results, list[str]]:
    """Stores the errors of the test cases, compiled for this machine's accelerator."""
    stored = _start("kernel_checks", settings)
    rows, faults = _checked(settings)
    for row in rows:
        stored = stored.add({"name": row.pop("name"), "spec": row.pop("spec")}, row)
    return stored, faults


def _checked(settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the error of every test case against the reference, and what went wrong with which case."""
    at = backend.target()
    if settings.interpret:
        at = backend.Target(settings.interpret, "interpreted", "forward")

    def error(op: Op, spec: Spec) -> float:
        arrays = jax.jit(spec.arrays)(jax.random.key(settings.seed))
        run = lambda impl: jax.jit(lambda x: op.call(**x, **spec.options(), impl=impl))(arrays)  # noqa: E731
        with backend.aim(at):
            out = run(at.platform)
        return float(op.error(out, run("reference"), arrays | spec.options()))

    alone = at.platform == "tpu" and at.interpret is not None  # that interpreter has one memory for all
    with ThreadPoolExecutor(max_workers=1 if alone else 8) as pool:  # compilers leave Python alone
        errors = [(op, spec, pool.submit(error, op, spec)) for op, spec in _chosen(settings, "test")]
    rows, faults = [], []
    for op, spec, found in errors:
        try:
            row = {"name": op.name, "spec": spec.name, "error": found.result(), "limit": spec.limit()}
        except (NotImplementedError, jax.errors.JaxRuntimeError) as fault:
            faults.append(f"{op.name} {spec.name}: {fault}")
            continue
        if row["error"] <= row["limit"]:
            rows.append(row)
        else:
            faults.append(f"{op.name} {spec.name} is wrong: error {row['error']} above {row['limit']}")
    return rows, faults


def _timed(settings: Settings) -> tuple[results.Results, list[str]]:
    """Compiles all programs side by side, then times them; returns also what went wrong with which case."""
    stored = _start("kernels", settings)
    rates = {"device": timing.copy_rate(), _LINK: timing.host_copy_rate()}
    stored = stored.claim({f"copy_gb_per_s.{name}": rate / 1e9 for name, rate in rates.items()})
    with ThreadPoolExecutor(max_workers=8) as pool:  # each holds an input set
        cases = [(case, pool.submit(prepare, *case, settings.seed)) for case in _chosen(settings, "bench")]
    faults = []
    for (op, spec), ready in cases:
        where = _LINK if getattr(spec, "host", False) else "device"
        try:
            rows = list(measure(ready.result(), rates[where], settings))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            faults.append(f"{op.name} {spec.name}: {error}")
            continue
        for row in rows:
            stored = stored.add({"name": op.name, "spec": spec.name, "peer": row.pop("peer")}, row)
        stored = stored.claim(claims(stored.rows))
    return stored, faults


@dataclass(frozen=True)
class Case:
    """A case ready to be timed: compiled programs of input sets, the kernel's under the name ""."""

    op: Op
    spec: Spec
    n_sets: int
    make: Callable[[jax.Array], Any]
    reference: Callable[[Any], Any]
    prepare: Mapping[str, Callable[[Any], Any]]  # makes a peer's inputs
    programs: Mapping[str, Callable[[Any], Any]]


def prepare(op: Op, spec: Spec, seed: int = 0) -> Case:
    """Compiles a case and its peers."""
    impl, n = backend.target().platform, timing.n_sets(spec)
    key = jax.random.key(seed)
    make = jax.jit(spec.arrays).lower(key).compile()
    sample = make(key)  # arrays and not shapes, which do not tell host memory from the device's
    run = lambda impl: lambda x: op.call(**x, **spec.options(), impl=impl)  # noqa: E731
    preparers, programs = {}, {"": timing.layers(run(impl), [sample] * n)}
    for peer in PEERS.get(op.name, lambda op, spec: ())(op, spec):
        preparers[peer.name] = jax.jit(peer.prepare).lower(sample).compile()
        programs[peer.name] = timing.layers(peer.run, [preparers[peer.name](sample)] * n)
    reference = jax.jit(run("reference")).lower(sample).compile()
    return Case(op, spec, n, make, reference, preparers, programs)


def measure(case: Case, rate: float, settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields one row for the kernel, or one per peer that it has."""
    op, spec = case.op, case.spec
    sets = [case.make(key) for key in jax.random.split(jax.random.key(settings.seed), case.n_sets)]
    inputs = {"": sets} | {name: [prepare(x) for x in sets] for name, prepare in case.prepare.items()}
    times = timing.race({name: (run, inputs[name]) for name, run in case.programs.items()}, settings.samples)
    error = op.error(case.programs[""](sets)[0], case.reference(sets[0]), sets[0] | spec.options())
    if not error <= spec.limit():
        raise ValueError(
            f"{op.name} {spec.name} is wrong: error {error} above {spec.limit()}; it is not timed"
        )
    time, spread = times.pop("")
    floor = spec.bytes() / rate * 1e6
    own = {
        "impl": backend.target().platform, "bytes": spec.bytes(), "n_sets": len(sets), "time_us": time,
        "spread_us": spread, "floor_us": floor, "fraction": floor / time, "error": error,
    }  # fmt: skip
    if not times:
        yield own | {"peer": "", "peer_us": None, "speedup": None}
    for name, (peer_us, _) in times.items():
        yield own | {"peer": name, "peer_us": peer_us, "speedup": peer_us / time}


def _table(rows: Sequence[Mapping[str, Any]], what: str) -> Table:
    title = f"kernels on {backend.target().device}" if what == "time" else "kernels against references"
    table = Table(title=title)
    columns = {
        "time": ("floor_us", "time_us", "spread_us", "fraction", "peer", "peer_us", "speedup", "error"),
        "error": ("error", "limit"),
    }[what]
    for column in ("name", "spec", *columns):
        table.add_column(
            column, justify="left" if column in ("name", "spec", "peer") else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in ("name", "spec", *columns)))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.1e}"
            if abs(value) < 0.01
            else f"{value:.3g}"
            if math.fabs(value) < 100
            else f"{value:.0f}"
        )
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
