"""Times every kernel on this machine's accelerator: `python -m experiments.kernels` (`make kernels`).

Each line is one case: the time that its bytes need at the copy rate measured in the same run, the
median time of the kernel, their ratio, the peers' times and the error against the reference. Peers
and kernel take turns; several input sets, larger than the cache together, run in one program.

On a machine without an accelerator, `--interpret` runs the test cases in the interpreters and
prints errors only: it times nothing.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments import options, results
from experiments.kernel_peers import PEERS
from pallas_kernels import backend, timing
from pallas_kernels.op import Op, Spec
from pallas_kernels.registry import ops

__all__ = ["Settings", "claims", "main", "measure"]

_MIB = 2**20
_LINK = "host"  # the copy rate that a case in host memory is held against


@dataclass(frozen=True)
class Settings:
    """ops: which to run, all by default. interpret: "gpu" or "tpu", to check without an accelerator."""

    ops: tuple[str, ...] = ()
    interpret: str | None = None
    samples: int = 15
    seed: int = 0
    out: Path = results.FOLDER


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 on a fault, 2 on a bad option."""
    console = Console(stderr=True)
    try:
        settings = options.parse(Settings, sys.argv[1:] if arguments is None else arguments, __doc__)
        _check(settings)
        if settings.interpret:
            Console().print(_table(list(_interpreted(settings)), "error"))
        else:
            stored = _timed(settings)
            Console().print(_table(stored.rows, "time"))
            Console().print(str(stored.path), soft_wrap=True, highlight=False)
    except ValueError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except OSError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 1
    return 0


def _check(settings: Settings) -> None:
    if unknown := set(settings.ops) - ops().keys():
        raise ValueError(f"an op is one of {', '.join(ops())}, got {sorted(unknown)}")
    if settings.interpret not in (None, "gpu", "tpu"):
        raise ValueError(f"kernels of gpu or tpu are interpreted, got {settings.interpret=}")
    platform = backend.target().platform
    if settings.interpret is None and platform == "cpu":
        raise ValueError(
            "kernels are timed on a GPU or TPU, got platform 'cpu': "
            'use --interpret gpu (make kernels ARGS="--interpret gpu") to check them here'
        )


def _chosen(settings: Settings, use: str) -> Iterator[tuple[Op, Spec]]:
    for name, op in ops().items():
        if not settings.ops or name in settings.ops:
            yield from ((op, spec) for spec in op.specs if use in spec.uses)


def _interpreted(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields the error of every test case against the reference."""
    for op, spec in _chosen(settings, "test"):
        arrays = spec.arrays(jax.random.key(settings.seed))
        with backend.aim(backend.Target(settings.interpret, "interpreted", "forward")):
            out = op.call(**arrays, **spec.options(), impl=settings.interpret)
        expected = op.call(**arrays, **spec.options(), impl="reference")
        error = op.error(out, expected, arrays | spec.options())
        yield {"name": op.name, "spec": spec.name, "error": error, "limit": spec.limit()}


def _timed(settings: Settings) -> results.Results:
    """Times what is not stored yet."""
    arguments = options.as_arguments(settings)
    stored = results.start("kernels", settings.seed, folder=settings.out, command=" ".join(
        ["python -m experiments.kernels", *arguments]))  # fmt: skip
    rates = {"device": timing.copy_rate(), _LINK: timing.host_copy_rate()}
    stored = stored.claim({f"copy_gb_per_s.{name}": rate / 1e9 for name, rate in rates.items()})
    for op, spec in _chosen(settings, "bench"):
        where = _LINK if getattr(spec, "host", False) else "device"
        for row in measure(op, spec, rates[where], settings):
            stored = stored.add({"name": op.name, "spec": spec.name, "peer": row.pop("peer")}, row)
        stored = stored.claim(claims(stored.rows))
    return stored


def measure(op: Op, spec: Spec, rate: float, settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields one row for the kernel, or one per peer that it has."""
    impl = backend.target().platform
    run = lambda x: op.call(**x, **spec.options(), impl=impl)  # noqa: E731
    sets = timing.input_sets(spec, settings.seed)
    programs = {"": (run, sets)}
    for peer in PEERS.get(op.name, lambda op, spec: ())(op, spec):
        programs[peer.name] = (peer.run, [peer.prepare(x) for x in sets])
    times = timing.race(programs, settings.samples)
    expected = op.call(**sets[0], **spec.options(), impl="reference")
    error = op.error(jax.jit(run)(sets[0]), expected, sets[0] | spec.options())
    if not error <= spec.limit():
        raise ValueError(
            f"{op.name} {spec.name} is wrong: error {error} above {spec.limit()}; it is not timed"
        )
    time, spread = times.pop("")
    floor = spec.bytes() / rate * 1e6
    own = {
        "impl": impl, "bytes": spec.bytes(), "n_sets": len(sets), "time_us": time, "spread_us": spread,
        "floor_us": floor, "fraction": floor / time, "error": error,
    }  # fmt: skip
    if not times:
        yield own | {"peer": "", "peer_us": None, "speedup": None}
    for name, (peer_us, _) in times.items():
        yield own | {"peer": name, "peer_us": peer_us, "speedup": peer_us / time}


def claims(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures that README and docs quote, of the rows that are there."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for row in rows:
        name, spec, peer = row["name"], row["spec"], row["peer"]
        if name == "decode_attention" and peer in ("cudnn", "jax_op"):
            if row["bytes"] > 256 * _MIB:
                note("decode_attention.copy_fraction_min", row["fraction"])
            elif row["bytes"] > 64 * _MIB:
                note("decode_attention.copy_fraction_64mb_min", row["fraction"])
            note(f"decode_attention.vs_{peer}_min", row["speedup"])
        elif name == "decode_attention" and peer:
            kind = "ragged" if peer == "uniform heads" else "int8" if "int8" in spec else "int4"
            note(f"decode_attention.{kind}_time_ratio", -1 / row["speedup"])
        elif name == "sparse_decode_attention" and "int" not in spec and spec.startswith("b8"):
            kind = ("host_" if "host" in spec else "") + ("token" if "-p1x" in spec else "block")
            note(f"sparse_decode_attention.{kind}_fraction", row["fraction"])
        elif name == "chunked_similarity":
            note("chunked_similarity.vs_read_k", -1 / row["fraction"])
        elif name == "vq_scores":
            note("vq_scores.vs_exact", row["speedup"])
        elif name == "select_topk" and peer:
            note("select_topk.vs_lax", row["speedup"])
        elif name in ("spvmm", "vmmsp") and peer and spec.startswith("b1-"):
            zeros = next(part[1:] for part in spec.split("-") if part.startswith("z"))
            if zeros == "0":
                note("sparse_matvec.time_ratio_0", -1 / row["speedup"])
            else:
                note(f"sparse_matvec.speedup_{zeros}", row["speedup"])
    return {name: abs(min(values)) for name, values in found.items()}  # the worst: ratios of time are negated


def _table(rows: Sequence[Mapping[str, Any]], what: str) -> Table:
    table = Table(title=f"kernels on {backend.target().device}" if what == "time" else "kernels, interpreted")
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
