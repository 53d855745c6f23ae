"""Compares every method on one model: quality, bytes held, bytes read and time, in one run.

usage: make compare [ARGS="--methods snapkv h2o --budgets 0.5 0.25"]

One batch of real prose and of pass-key texts is prefilled once and handed to every method at every
budget. Rows are stored as they are finished: Ctrl-C keeps them, and the same command goes on.
"""

import dataclasses
import hashlib
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvjax
from experiments import options, plot, plugin, report, results, trial
from experiments.batch import Batch, lay_out
from experiments.plan import Methods, Trial, plan
from experiments.results import Results
from experiments.trial import Outcome, Prefilled
from kvjax import text
from kvjax.calibrate import codebooks

__all__ = ["Settings", "compare", "main"]

_THREADS = 2  # programs compiled at once


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        text: pydoc_data.topics (prose that every Python has), or a text file.
        context: tokens before the question.
        continuation: tokens of prose scored after the context.
        docs: rows of prose.
        methods: such as snapkv:window=16 or snapkv+kivi4; by default all.
        budgets: shares of the tokens to keep; 1 stands for the full cache.
        seed: chooses excerpts and pass keys.
        out: the folder of results.
        plugin: a .py file that defines a method, which joins the table.
        calibration: a folder of `kvjax calibrate a2ats`, whose method joins the table.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    text: str = text.PROSE
    context: int = 2048
    continuation: int = 32
    docs: int = 4
    methods: tuple[str, ...] = ()
    budgets: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    seed: int = 0
    out: Path = results.FOLDER
    plugin: Path | None = None
    calibration: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 on a fault, 2 on a bad option, 130 on Ctrl-C."""
    console = Console(stderr=True)
    try:
        settings = options.parse(Settings, sys.argv[1:] if arguments is None else arguments, __doc__)
        stored = compare(settings, console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except OSError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt as stop:
        where = f" {stop}" if str(stop) else ""
        console.print(
            f"Interrupted.{where} The same command goes on from there.", highlight=False, markup=False
        )
        return 130
    Console().print(report.table(stored.rows))
    Console().print(report.NOTE, style="dim", highlight=False)
    Console().print(f"{stored.path}\n{plot.path_of(stored.path)}", soft_wrap=True, highlight=False)
    return 0


def compare(settings: Settings, console: Console) -> Results:
    """Measures what is not stored yet, and returns the table's rows.

    Raises:
        ValueError: for settings that cannot be run.
        OSError: for a file that cannot be read or written.
        KeyboardInterrupt: says how much is stored.
    """
    run = _prepared(settings, console)
    command = " ".join(["python -m experiments.compare", *map(shlex.quote, options.as_arguments(settings))])
    start = partial(results.start, "compare", settings.seed, folder=settings.out, command=command)
    stored = start()
    missing = [t for t in run.trials if stored.find(run.settings_of(t)) is None]
    if missing:
        try:
            stored = _measured(run, missing, stored, console)
        except KeyboardInterrupt:
            stored = start()
            raise KeyboardInterrupt(
                f"{len(stored.rows)} of {len(run.trials)} rows are in {stored.path}."
            ) from None
    stored = dataclasses.replace(stored, rows=tuple(stored.find(run.settings_of(t)) for t in run.trials))
    plot.draw(stored.rows, plot.path_of(stored.path))
    return stored


@dataclass(frozen=True)
class Run:
    """What is to be run; data: what figures depend on beside the method."""

    model: kvjax.Model
    batch: Batch
    trials: Sequence[Trial]
    data: dict

    def settings_of(self, t: Trial) -> dict:
        """Returns what tells a row from all others."""
        own = {
            "name": t.name,
            "spec": repr(t.method),
            "ratio": t.ratio,
            "budget": t.budget,
            "question": t.question,
        }
        return own | self.data


def _prepared(settings: Settings, console: Console) -> Run:
    """Checks the settings, the names before anything is downloaded, and loads what they name."""
    methods: Methods = kvjax.METHODS | (plugin.load(settings.plugin) if settings.plugin else {})
    if settings.calibration is None:
        plan(settings.methods, settings.budgets, settings.context, methods)
    with console.status(f"Loading {settings.model}"):
        model = kvjax.load(settings.model, settings.dtype)
    if model.tokenizer is None:
        raise ValueError(
            f"a comparison needs a tokenizer, got none with {settings.model!r}: add tokenizer.json"
        )
    given = {"calibration": codebooks.load(settings.calibration, model)} if settings.calibration else {}
    batch = lay_out(
        model.tokenizer, settings.text, context=settings.context, continuation=settings.continuation,
        docs=settings.docs, seed=settings.seed,
    )  # fmt: skip
    source = hashlib.sha256(settings.plugin.read_bytes()).hexdigest()[:12] if settings.plugin else None
    data = {"model": settings.model, "dtype": str(model.dtype), "data": batch.digest, "plugin": source}
    trials = plan(settings.methods, settings.budgets, batch.total, methods, **given)
    for method, layer in ((m, layer) for t in trials for m, layer in t.layers(model.config)):
        if getattr(method, "budget", None) is not None:
            method.budgets(layer)  # one that is too small is told before anything is measured
    return Run(model, batch, trials, data)


def _measured(run: Run, missing: Sequence[Trial], stored: Results, console: Console) -> Results:
    """Measures the missing rows, and the full cache before them, which they are compared with."""
    rows = missing if missing[0] == run.trials[0] else [run.trials[0], *missing]
    programs = list(dict.fromkeys(t.method for t in rows))
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            f"prefilling {len(run.batch.prompts)} rows", total=1 + len(programs) + len(rows)
        )
        pre = trial.prefilled(run.model, run.batch)
        progress.update(task, advance=1, description=f"compiling {len(programs)} programs")
        compiled = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for method, span in zip(
                programs, pool.map(partial(trial.compile_decode, pre), programs), strict=True
            ):
                compiled[method] = span.compile_s
                progress.advance(task)
        full = None
        for t, outcome in _outcomes(pre, rows, lambda t: progress.update(task, description=_title(t))):
            full = full or outcome
            values = outcome.values | {
                "prefill_s": pre.span.run_s,
                "compile_s": outcome.values["compile_s"] + compiled[t.method],
                "held": outcome.values["bytes_held"] / full.values["bytes_held"],
                "read": outcome.values["bytes_read"] / full.values["bytes_read"],
            }
            stored = stored.add(run.settings_of(t), values).claim(report.claims(t, values))
            progress.advance(task)
    return stored


def _outcomes(
    pre: Prefilled, rows: Sequence[Trial], begins: Callable[[Trial], None]
) -> Iterator[tuple[Trial, Outcome]]:
    """Yields each row's outcome. Rows of one method share the prompt as it was before compression."""
    full = None
    for _, group in itertools.groupby(rows, key=lambda t: t.name):
        prompts = {}
        for t in group:
            begins(t)
            slots = trial.capacity(pre, t.method)
            if slots not in prompts:
                prompts[slots] = trial.read(pre, t.method)
            if t.question == "seen" and not prompts[slots].asked:
                prompts[slots] = trial.read_question(pre, t.method, prompts[slots])
            outcome = trial.run(pre, t, prompts[slots], full)
            full = full or outcome
            yield t, outcome


def _title(t: Trial) -> str:
    return f"{t.name} at {t.ratio:.4g}, question {t.question}"


if __name__ == "__main__":
    sys.exit(main())
