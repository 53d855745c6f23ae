"""Keeps an experiment's figures in a JSON file that survives a kill, a full disk and a rerun.

    results = start("compare", seed=0)
    for settings in grid:                                  # {"model": ..., "method": ..., "budget": ...}
        if results.find(settings) is None:
            results = results.add(settings, measure(settings))   # on disk when this returns
    results = results.claim({"full.perplexity": 19.7})

A file belongs to one run: the same experiment, command, seed, device, versions and source. A rerun of that
run goes on where it stopped; anything else gets a file of its own, so no figure stands under a header that
is not its own, and nothing is overwritten.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments import provenance

__all__ = ["Results", "load", "newest", "start"]

FOLDER = Path(__file__).parent / "results"
HEADER = {
    "experiment": str,
    "command": str,
    "commit": str,
    "date": str,
    "seed": int,
    "device": str,
    "versions": dict,
}
IDENTITY = ("experiment", "command", "seed", "device", "versions")  # what a rerun must share to go on


@dataclass(frozen=True)
class Results:
    """One results file as it stands on disk; `add` and `claim` write it and return the new one."""

    path: Path
    header: Mapping[str, object]
    rows: tuple[dict, ...] = ()
    claims: Mapping[str, float] = field(default_factory=dict)

    def find(self, settings: Mapping) -> dict | None:
        """Returns the row measured with exactly these settings, or None."""
        wanted = _as_json(settings)
        return next((row for row in self.rows if {k: row[k] for k in row["settings"]} == wanted), None)

    def add(self, settings: Mapping, values: Mapping) -> "Results":
        """Writes the row of these settings, in place of an older one.

        Settings and values lie flat in the row; its "settings" lists which of them are settings.

        Raises:
            ValueError: a name is taken twice, or a figure is not finite.
            TypeError: something in it is no JSON.
            OSError: the disk refused; the file from before is intact.
        """
        if taken := sorted((settings.keys() & values.keys()) | ({*settings, *values} & {"settings"})):
            raise ValueError(f"a row has each name once and keeps 'settings', got {taken=} twice: rename")
        row = _as_json({**settings, **values}) | {"settings": list(settings)}
        old = self.find(settings)
        rows = (*(r for r in self.rows if r is not old), row)
        return self._with(rows=rows)

    def claim(self, claims: Mapping[str, float]) -> "Results":
        """Writes the named figures that README and docs quote, beside those already there."""
        return self._with(claims={**self.claims, **_as_json(claims)})

    def _with(self, **parts: Any) -> "Results":
        new = replace(self, **parts)
        data = {**self.header, "rows": list(new.rows), "claims": dict(new.claims)}
        return replace(new, path=_write(self.path, data, first=not (self.rows or self.claims)))


def start(
    experiment: str,
    seed: int,
    device: str | None = None,
    folder: Path = FOLDER,
    command: str | None = None,
    resume: bool = True,
) -> Results:
    """Returns the results of this very run from an earlier, interrupted time, or empty new ones.

    A file that cannot be read is set aside as `<name>.corrupt`, with a warning. The device and the command
    are found out unless they are given; `resume=False` measures everything anew, in a new file.
    """
    device, slug = (device, provenance.slug(device)) if device else provenance.device()
    header = {
        "experiment": experiment,
        "command": command or provenance.command(),
        "commit": provenance.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "device": device,
        "versions": provenance.versions(),
    }
    folder = Path(folder) / experiment
    read = {path: _load_or_set_aside(path) for path in sorted(folder.glob("*.json"))}
    same = [p for p, old in read.items() if old and all(old[name] == header[name] for name in IDENTITY)]
    if same and resume:
        path = max(same, key=lambda p: read[p]["date"])
        old = read[path]
        return Results(path, {name: old[name] for name in HEADER}, tuple(old["rows"]), old["claims"])
    return Results(_free(folder / f"{slug}-{header['date'][:10]}.json"), header)


def load(path: str | Path) -> dict:
    """Returns a results file as a dict, checked.

    Raises:
        ValueError: it is no JSON, or lacks a part of what a results file has.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"a results file is JSON, got {str(path)!r} ({error}): run it again") from error
    if problem := _problem(data):
        raise ValueError(f"{problem}, got {str(path)!r}: run its experiment again")
    return data


def newest(
    experiment: str,
    options: str = "",
    folder: str | None = None,
    part: str | None = None,
    whole: bool = False,
    claim: str | None = None,
    device: str = "",
) -> tuple[dict, str]:
    """Returns the newest stored run of an experiment, and its path in the repository.

    Args:
        options: what its command begins with after the experiment's name.
        folder: of the results, where it is not the experiment's name.
        part: what it has rows of, where its rows say which part they are.
        whole: the command has no other options.
        claim: a figure that it has.
        device: what its device's name begins with.
    """
    command = f"python -m experiments.{experiment}{options}"
    found = [(load(path), path) for path in (FOLDER / (folder or experiment)).glob("*.json")]
    fits = [
        (run, path)
        for run, path in found
        if (run["command"] == command if whole else run["command"].startswith(command))
        and (part is None or any(row["part"] == part for row in run["rows"]))
        and (claim is None or claim in run["claims"])
        and run["device"].startswith(device)
    ]
    stored, path = max(fits, key=lambda pair: pair[0]["date"])
    return stored, path.relative_to(provenance.ROOT).as_posix()


def _problem(data: object) -> str | None:
    """Says what keeps `data` from being a results file, or None."""
    if not isinstance(data, dict):
        return "a results file holds a JSON object"
    for name, kind in (HEADER | {"rows": list, "claims": dict}).items():
        if type(data.get(name)) is not kind:
            return f"a results file has {name!r} of type {kind.__name__}"
    if not all(_is_row(row) for row in data["rows"]):
        return "each of a results file's rows is an object whose 'settings' names some of its fields"
    if not all(type(value) in (int, float) for value in data["claims"].values()):
        return "each of a results file's claims is a number"
    return None


def _is_row(row: object) -> bool:
    if not (isinstance(row, dict) and isinstance(row.get("settings"), list)):
        return False
    return all(isinstance(name, str) and name in row for name in row["settings"])


def _load_or_set_aside(path: Path) -> dict | None:
    if not path.stat().st_size:
        return None  # a run that began just now takes this name, or was killed as it did
    try:
        return load(path)
    except ValueError as error:
        aside = _free(path.with_suffix(".json.corrupt"))
        path.rename(aside)
        warnings.warn(f"{error}. It is kept as {aside.name}", stacklevel=3)
        return None


def _as_json(values: Mapping) -> dict:
    """Returns the values as they will be read back: lists for tuples, numbers for 0-d arrays."""
    try:
        text = json.dumps(dict(values), allow_nan=False, default=lambda x: x.item())
    except ValueError as error:
        raise ValueError(f"figures are finite, got {dict(values)!r}: use None for a missing one") from error
    except (AttributeError, TypeError) as error:
        raise TypeError(f"figures are JSON or 0-d arrays, got {dict(values)!r}: convert them") from error
    return json.loads(text)


def _as_text(data: dict) -> str:
    """Returns the file's text, one row a line, so that a change of one row is a change of one line."""
    rows = ",".join("\n  " + json.dumps(row, ensure_ascii=False) for row in data["rows"])
    fields = {name: json.dumps(value, ensure_ascii=False) for name, value in data.items()}
    fields["rows"] = f"[{rows}\n ]" if rows else "[]"
    return "{\n" + ",\n".join(f' "{name}": {value}' for name, value in fields.items()) + "\n}\n"


def _write(path: Path, data: dict, first: bool) -> Path:
    """Replaces the file at once: whoever reads it, or a crash, sees the old or the new one, whole.

    Returns: its path; where it is the first of a run, one that no run beside it has taken.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = _taken(path) if first else path
    except OSError as error:
        raise _refused(error, path) from error
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed run left is overwritten
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(_as_text(data))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        for left in (temporary, path)[: 1 + first]:
            left.unlink(missing_ok=True)
        raise _refused(error, path) from error
    return path


def _refused(error: OSError, path: Path) -> OSError:
    return OSError(
        error.errno,
        f"results are written whole or not at all, got {error.strerror!r}: "
        "the file from before is intact, make room and run again to go on",
        str(path),
    )


def _taken(path: Path) -> Path:
    """Returns a path that no file had, as an empty file: of two runs that begin together each has its own."""
    while True:
        path = _free(path)
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path


def _free(path: Path) -> Path:
    """Returns the path, or the first of `<name>-2`, `<name>-3`, ... that no file has."""
    stem, dot, rest = path.name.partition(".")
    n, free = 1, path
    while free.exists():
        n += 1
        free = path.with_name(f"{stem}-{n}{dot}{rest}")
    return free
