"""Measures the whole decode step of an 8B-shaped model: what it needs of eight TPUs, and how fast a GPU is.

usage: python -m experiments.decode aot      compile it for described TPUs, on any machine
       python -m experiments.decode speed    time it on this machine's accelerator

`aot` stores the compiler's analysis of memory and says what is wrong with it: the cache must be
updated in place, never copied, and no collective may carry keys or values. It needs libtpu, in the
environment or in its folder `compilers` (`make test` puts it there).
`speed` fills the cache with random tokens and decodes from random weights. The floor is the time
that reading weights, keys and values once takes at the copy rate measured in the same run.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments import command, decode_model, options, results
from kvjax import states
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.models.config import ModelConfig
from pallas_kernels import dispatch, timing
from pallas_kernels.topology import Described, environment

__all__ = ["Aot", "Speed", "aot", "main", "problems", "speed"]

_CHILD = Path(__file__).parent / "decode_child.py"
_COMPILERS = Path(sys.prefix) / "compilers"
_SMALL = 64 * 2**20  # temporaries that no cache is needed to explain: what XLA keeps in VMEM counts


@dataclass(frozen=True)
class Aot:
    """What to compile.

    Args:
        devices: v5e, v5p or v6e, of which eight are described.
        shape: of the model: llama-3.1-8b, or tiny for a trial.
        layers: fewer than the shape has.
        cases: batch x slots of the full cache.
        out: the folder of results.
    """

    devices: tuple[str, ...] = ("v5e", "v6e")
    shape: str = "llama-3.1-8b"
    layers: int | None = None
    cases: tuple[str, ...] = ("1x8192", "8x32768")
    out: Path = results.FOLDER


@dataclass(frozen=True)
class Speed:
    """What to time.

    Args:
        shape: of the model: llama-3.1-8b, or tiny for a trial.
        layers: fewer than the shape has.
        cases: batch x tokens in the full cache.
        steps: decode steps in one call.
        samples: calls timed; their median counts.
        copy_mib: what is copied to measure the copy rate.
        seed: of weights and cache.
        out: the folder of results.
    """

    shape: str = "llama-3.1-8b"
    layers: int | None = None
    cases: tuple[str, ...] = ("1x8192", "8x32768")
    steps: int = 64
    samples: int = 9
    copy_mib: int = 1024
    seed: int = 0
    out: Path = results.FOLDER


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `command.run`."""
    return command.run(_COMMANDS, arguments, __doc__)


def aot(settings: Aot) -> int:
    """Compiles what is not stored yet, prints the figures, and returns 1 if a step is not as it should be."""
    config, cases = decode_model.config_of(settings.shape, settings.layers), _cases(settings.cases)
    wrong = 0
    for device in settings.devices:
        stored = _start("aot", "decode_aot", settings, 0, f"8 x {Described(device).kind}, described")
        missing = [case for case in cases if stored.find(_row(settings, config, case)) is None]
        for values in _compiled(device, settings, missing) if missing else ():
            case = (values.pop("batch"), values.pop("slots"))
            stored = stored.add(_row(settings, config, case), values)
            if values["fits"]:
                stored = stored.claim({f"full.peak_bytes_{_label(case)}": values["peak_bytes"]})
        for case in cases:
            row = stored.find(_row(settings, config, case))
            print(f"{device} {_label(case)}: {_in_words(row)}")
            for problem in problems(row, config, case):
                print(f"  wrong: {problem}")
                wrong += 1
        print(stored.path)
    return min(wrong, 1)


def problems(row: Mapping[str, Any], config: ModelConfig, case: tuple[int, int]) -> list[str]:
    """Says what is wrong with a compiled step."""
    if not row["fits"]:
        return []
    found = []
    if row["alias_bytes"] < row["state_bytes"]:
        found.append(f"{row['state_bytes']} bytes of cache are updated in place, got {row['alias_bytes']}")
    if row["temp_bytes"] > max(row["state_bytes"] // 2, _SMALL):
        found.append(f"temporaries are small beside the cache, got {row['temp_bytes']} bytes")
    if row["cache_copies"]:
        found.append(f"keys and values are not copied, got {row['cache_copies']} copies")
    activations = 4 * case[0] * max(config.vocab_size, config.ffn_width)
    for name, one in row["collectives"].items():
        if one["largest_bytes"] > activations:
            found.append(f"collectives carry activations only, got {name} of {one['largest_bytes']} bytes")
    return found


def speed(settings: Speed) -> int:
    """Times what is not stored yet, and prints the figures."""
    config, cases = decode_model.config_of(settings.shape, settings.layers), _cases(settings.cases)
    stored = _start("speed", "decode", settings, settings.seed)
    missing = [case for case in cases if stored.find(_row(settings, config, case)) is None]
    if missing:
        model = decode_model.random(settings.shape, config, settings.seed)
        rate = timing.copy_rate(settings.copy_mib * 2**20)
        for case in missing:
            values = _timed(model, case, settings, rate)
            stored = stored.add(_row(settings, config, case), values)
            stored = stored.claim({f"full.fraction_{_label(case)}": values["fraction"]})
    for case in cases:
        row = stored.find(_row(settings, config, case))
        print(
            f"{_label(case)}: {row['time_us']:.0f} us a step, {row['fraction']:.2f} of the byte limit's rate"
        )
    print(stored.path)
    return 0


def _timed(model: Model, case: tuple[int, int], settings: Speed, rate: float) -> dict[str, Any]:
    """Decodes greedily from a full cache, several steps a call as `generate` does."""
    batch, tokens = case
    room = settings.steps * (settings.samples + 1)
    state = states.init_state(model, Full(), batch, tokens + room)
    state = decode_model.occupied(state, tokens, settings.seed)
    logits = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    forced = np.full((batch, settings.steps), -1, np.int32)
    times = []
    with dispatch.watch() as taken:
        for _ in range(settings.samples + 1):  # the first one compiles
            start = time.perf_counter()
            _, logits, state, _ = jax.block_until_ready(kvjax.decode(model, logits, state, Full(), forced))
            times.append((time.perf_counter() - start) / settings.steps * 1e6)
    if not bool(jnp.isfinite(logits).all()) or int(state[0].seen.min()) != tokens + room:
        raise RuntimeError(
            "the step that was timed went wrong: its logits are not finite, or steps are missing"
        )
    time_us, n_bytes = statistics.median(times[1:]), _step_bytes(model, case)
    floor = n_bytes / rate * 1e6
    return {
        "impl": taken, "time_us": time_us, "floor_us": floor, "fraction": floor / time_us, "bytes": n_bytes,
        "copy_gb_per_s": rate / 1e9, "samples_us": times[1:],
    }  # fmt: skip


def _step_bytes(model: Model, case: tuple[int, int]) -> int:
    """Returns the bytes of the weights, and of keys and values before the first step, each read once."""
    c, (batch, tokens) = model.config, case
    weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
    if not c.tied_embeddings:
        weights -= model.params["embed"]["embedding"].nbytes  # a few rows of which are read
    return weights + 2 * c.n_layers * batch * tokens * c.n_kv_heads * c.head_dim * model.dtype.itemsize


def _compiled(device: str, settings: Aot, cases: Sequence[tuple[int, int]]):
    """Yields the child's lines as they come.

    Raises:
        RuntimeError: where the child fails.
    """
    request = {"device": device, "shape": settings.shape, "n_layers": settings.layers, "cases": cases}
    path = [str(_CHILD.parent.parent), str(_COMPILERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(_CHILD), json.dumps(request)]
    variables = os.environ | environment() | {"PYTHONPATH": os.pathsep.join(path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as child:
        yield from map(json.loads, child.stdout)
    if child.returncode:
        raise RuntimeError(
            f"the compiler takes the decode step for {device}, got exit code {child.returncode}: see above"
        )


def _start(command: str, experiment: str, settings: Any, seed: int, device: str | None = None):
    words = [
        "python -m experiments.decode",
        command,
        *map(shlex.quote, options.as_arguments(settings, skip=("out",))),
    ]
    return results.start(experiment, seed, device, settings.out, " ".join(words))


def _row(settings: Aot | Speed, config: ModelConfig, case: tuple[int, int]) -> dict[str, Any]:
    """Returns what tells a row from all others."""
    spec = f"{settings.shape} bfloat16, {config.n_layers} layers"
    return {"name": "full", "spec": spec, "batch": case[0], "slots": case[1]}


def _cases(words: Sequence[str]) -> list[tuple[int, int]]:
    """Parses cases such as 8x32768.

    Raises:
        ValueError: for one that is not two positive numbers.
    """
    cases = []
    for word in words:
        numbers = word.split("x")
        if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise ValueError(f"a case is batch x slots, such as 8x32768, got {word!r}")
        cases.append((int(numbers[0]), int(numbers[1])))
    return cases


def _label(case: tuple[int, int]) -> str:
    """Returns the name of a case in claims: b8_32k."""
    batch, slots = case
    return f"b{batch}_{slots // 1024}k" if slots % 1024 == 0 else f"b{batch}_{slots}"


def _in_words(row: Mapping[str, Any]) -> str:
    if not row["fits"]:
        return f"does not fit: {row['error']}"
    held = " + ".join(f"{row[f'{name}_bytes'] / 2**20:.0f} MiB of {name}" for name in ("params", "state"))
    moved = ", ".join(f"{one['count']} {name}" for name, one in row["collectives"].items())
    peak, temp = row["peak_bytes"] / 2**20, row["temp_bytes"] / 2**20
    return f"peak {peak:.0f} MiB a device ({held}, {temp:.0f} MiB temporary); {moved}; {row['impl']}"


_COMMANDS: command.Commands = {"aot": (Aot, aot), "speed": (Speed, speed)}

if __name__ == "__main__":
    sys.exit(main())
