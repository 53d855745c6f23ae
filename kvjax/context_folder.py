"""Lays out a folder of contexts: generations beside each other, and a manifest that names the whole one.

FOLDER/manifest.json        whose context this is, and which generation is whole; replaced in one step
FOLDER/00000003/000.blocks  the arrays of layer 0, of generation 3, see `blocks`
FOLDER/00000002/000.chunks  its rows, of a method that keeps them on disk, see `chunk_files`
FOLDER/lock                 held by the process that writes
"""

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import xxhash

__all__ = [
    "check_identity", "check_space", "generations", "identity", "lock", "new_generation", "read_manifest",
    "sweep", "sync", "write_manifest",
]  # fmt: skip

_FORMAT = 2
_OWN = re.compile(r"\d+\.(blocks|chunks|chunks4)|manifest\.(json|new)")  # what a generation is made of


def lock(folder: Path) -> TextIO:
    """Keeps other processes, and other states of this one, from writing to a folder until it is closed.

    Raises:
        ValueError: where another one does.
        OSError: where the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = open(folder / "lock", "a")  # noqa: SIM115  closed by whoever asked for it
    except OSError as error:
        raise type(error)(
            f"a context lies in a folder that can be written to, got {str(folder)!r} ({error.strerror}): "
            "take another"
        ) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise ValueError(f"one process writes to a folder, got another in {str(folder)!r}") from error
    return held


def generations(folder: Path) -> list[Path]:
    """Returns the generations of a folder, the oldest first: what holds nothing else, as a user's may."""
    return sorted(path for path in _numbered(folder) if all(_OWN.fullmatch(x.name) for x in path.iterdir()))


def _numbered(folder: Path) -> list[Path]:
    return [x for x in folder.iterdir() if x.is_dir() and re.fullmatch(r"\d{8,}", x.name)]


def new_generation(folder: Path) -> Path:
    """Makes a generation after the others."""
    path = folder / f"{1 + max((int(old.name) for old in _numbered(folder)), default=0):08}"
    path.mkdir()
    return path


def sweep(folder: Path) -> None:
    """Removes the generations that the manifest does not name.

    Raises:
        ValueError: for a damaged manifest, which may name any.
    """
    try:
        about = read_manifest(folder)
    except FileNotFoundError:
        about = {}
    for old in generations(folder):
        if int(old.name) not in (about.get("generation"), about.get("chunks")):
            shutil.rmtree(old)


def identity(model: str, method: str) -> dict[str, Any]:
    """Returns what a context is of, given a model's fingerprint and a method's repr.

    A repr leaves out what may change from one opening to the next.
    """
    return {"format": _FORMAT, "byte_order": sys.byteorder, "model": model, "method": method}


def check_identity(about: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError for a context of another model, method, format or byte order."""
    for name, value in wanted.items():
        if about[name] != value:
            raise ValueError(
                f"a context is of one {name.replace('_', ' ')}, got {about[name]!r} in {str(folder)!r} for "
                f"{value!r}"
            )


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError where a disk has less room than that many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"a context of {needed / 2**20:.0f} MiB fits its disk, got {free / 2**20:.0f} MiB free for "
            f"{str(folder)!r}: make room, or take another disk"
        )


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Replaces the manifest; a reader sees the old one or the new one."""
    new = folder / "manifest.new"
    with open(new, "w", encoding="utf-8") as file:
        json.dump({"about": about, "xxh3": _digest(about)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / "manifest.json")
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns what the manifest says.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is not what was written.
    """
    path = folder / "manifest.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        about = found["about"]
        if found["xxh3"] != _digest(about):
            raise ValueError("its checksum is another")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"a context is a folder of save_context, got none in {str(folder)!r}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"a manifest is as it was written, got {str(path)!r} ({error}): it is damaged"
        ) from error
    return about


def sync(folder: Path) -> None:
    """Waits until a folder's names are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(about: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(about, sort_keys=True).encode())
