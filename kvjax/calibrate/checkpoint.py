"""Writes and reads named arrays with a description, as one Orbax checkpoint.

A checkpoint appears whole or not at all: Orbax writes it beside its place and renames it. Arrays are read
as NumPy's, in the type they were written in, and compared with a digest of them. Orbax takes half a second to
import, so it is where it is called.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["check_same", "digest", "kept", "read", "write"]


def write(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes a checkpoint in place of one that is there.

    Args:
        arrays: none of them empty.
        about: what JSON can say; it comes back as JSON says it, with lists for tuples.
    """
    import orbax.checkpoint as ocp

    about = {"about": dict(about), "digest": digest(*(arrays[name] for name in sorted(arrays)))}
    items = ocp.args.Composite(arrays=ocp.args.StandardSave(dict(arrays)), about=ocp.args.JsonSave(about))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), items, force=True)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays and the description.

    Raises:
        ValueError: for a folder that is no whole checkpoint, or was damaged.
    """
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), about=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(path.absolute(), items)
        arrays, about = found.arrays, found.about
        if digest(*(arrays[name] for name in sorted(arrays))) != about["digest"]:
            raise ValueError("the arrays are not those that were written")
        return arrays, about["about"]
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise ValueError(
            f"a calibration is a whole checkpoint, got {str(path)!r} ({str(error)[:200]!r}): "
            "delete it and calibrate anew"
        ) from error


def kept(path: Path, stamp: dict, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Returns what a folder holds, or else makes and stores it.

    Raises:
        ValueError: where it holds that of another calibration.
    """
    if not path.is_dir():
        write(path, made := make(), stamp)
        return made
    arrays, about = read(path)
    check_same(about, stamp, path)
    return arrays


def check_same(about: Mapping[str, Any], stamp: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError where what a folder says of itself is another calibration."""
    if about != stamp:
        differ = sorted(name for name in stamp if about.get(name) != stamp[name])
        raise ValueError(
            f"a folder holds one calibration, got another {' and '.join(differ)} in {str(path)!r}: "
            "take another folder, or delete it"
        )


def digest(*arrays: np.ndarray) -> str:
    """Returns a name for the contents, types and shapes of arrays."""
    total = hashlib.sha256()
    for x in arrays:
        total.update(f"{x.dtype} {x.shape}".encode())
        total.update(np.ascontiguousarray(x).view(np.uint8))
    return total.hexdigest()[:16]
