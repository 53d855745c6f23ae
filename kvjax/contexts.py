"""Saves what a model has read, and opens it again without reading it anew.

    FOLDER/manifest.json        whose context this is, and which generation is whole; replaced in one step
    FOLDER/00000003/000.blocks  the state of layer 0, of generation 3, see `blocks`
    FOLDER/lock                 held by the process that writes

A context is written beside the old one and takes its place when all of it is on the disk, so a crash leaves
the old one or the new one. All arrays of a state are kept as they are, bit by bit, whatever the method.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import Int

from kvjax import blocks, measure
from kvjax.cache import KV, Layer
from kvjax.loop import State
from kvjax.method import CacheMethod
from kvjax.methods import layers, per_layer
from kvjax.model import Model, fingerprint

__all__ = ["Context", "load_context", "save_context"]

_FORMAT = 1
_BLOCK_BYTES = 2**20 - 2**10  # of a payload, so that a block with its seal takes 1 MiB


@dataclass(frozen=True, eq=False)
class Context:
    """A state that was opened again.

    Args:
        state: as it was saved.
        tokens: what had been read, [B T] with -1 for padding; None where it was not given.
    """

    state: State
    tokens: Int[np.ndarray, "B T"] | None


def save_context(
    folder: Path | str,
    model: Model,
    method: CacheMethod,
    state: State,
    tokens: Any = None,
) -> None:
    """Saves a state; one that is in the folder is replaced once this one is whole.

    Args:
        method: that the state is of.
        tokens: what has been read, [B T], to be kept with it.

    Raises:
        ValueError: for a state that lies on the host or on several devices, or a folder that another process
            writes to.
        OSError: where the disk is too small, which is looked at first, or refuses; the folder is as before.

    Example:
        >>> import kvjax, tempfile
        >>> model, method = kvjax.load("smollm2-135m"), kvjax.METHODS["full"]()
        >>> ids = kvjax.pad([model.tokenizer.encode("The capital of France is")])
        >>> logits, state = kvjax.prefill(model, ids, method, room=2)
        >>> folder = tempfile.mkdtemp()
        >>> kvjax.save_context(folder, model, method, state)
        >>> state = kvjax.load_context(folder, model, method).state
        >>> logits, state = kvjax.decode_step(model, logits.argmax(-1), state, method)
        >>> model.tokenizer.decode(logits.argmax(-1).tolist())
        '.'
    """
    if model.mesh is not None or any(kv.tier is not None for kv in state):
        raise ValueError('a context lies on one device, got one spread or on the host: take tier="device"')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, state)
    with _writing(folder):
        generation = 1 + max((int(path.name) for path in _generations(folder)), default=0)
        parts = folder / f"{generation:08}"
        parts.mkdir()
        try:
            saved = [_save_layer(parts / f"{i:03}.blocks", kv, generation) for i, kv in enumerate(state)]
            _sync(parts)
            about = {
                "format": _FORMAT, "byte_order": sys.byteorder, "model": fingerprint(model),
                "method": repr(method), "generation": generation, "layers": saved,
                "tokens": None if tokens is None else np.asarray(tokens).tolist(),
            }  # fmt: skip
            _write_manifest(folder, about)
        except BaseException:
            shutil.rmtree(parts, ignore_errors=True)
            raise
        for old in _generations(folder):
            if old != parts:
                shutil.rmtree(old)


def load_context(folder: Path | str, model: Model, method: CacheMethod) -> Context:
    """Opens a context.

    Args:
        method: the one that it was saved with.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for that of another model, method, format or byte order, or a damaged manifest.
        DamagedBlock: for a damaged or missing block, which it names.

    Example:
        >>> import kvjax, tempfile
        >>> model, method = kvjax.load("smollm2-135m"), kvjax.METHODS["full"]()
        >>> ids = kvjax.pad([[5, 6, 7]])
        >>> _, state = kvjax.prefill(model, ids, method, room=2)
        >>> folder = tempfile.mkdtemp()
        >>> kvjax.save_context(folder, model, method, state, tokens=ids)
        >>> kvjax.load_context(folder, model, method).tokens
        array([[5, 6, 7]], dtype=int32)
    """
    folder = Path(folder)
    about = _read_manifest(folder)
    wanted = {
        "format": _FORMAT, "byte_order": sys.byteorder, "model": fingerprint(model), "method": repr(method)
    }  # fmt: skip
    for name, value in wanted.items():
        if about[name] != value:
            raise ValueError(
                f"a context is of one {name.replace('_', ' ')}, got {about[name]!r} in {str(folder)!r} for "
                f"{value!r}"
            )
    parts = folder / f"{about['generation']:08}"
    kinds = zip(about["layers"], per_layer(method, model.config), layers(model.config), strict=True)
    state = tuple(
        _load_layer(parts / f"{i:03}.blocks", saved, about["generation"], m, layer, model.dtype)
        for i, (saved, m, layer) in enumerate(kinds)
    )
    tokens = about["tokens"]
    return Context(state, None if tokens is None else np.asarray(tokens, np.int32))


def _save_layer(path: Path, kv: KV, generation: int) -> dict[str, Any]:
    """Writes one layer's arrays, one after the other, and returns what they are."""
    arrays = [np.asarray(x) for x in jax.tree.leaves(kv)]
    whole = b"".join(x.tobytes() for x in arrays)
    with blocks.create(path, _BLOCK_BYTES, generation) as file:
        for i, start in enumerate(range(0, len(whole), _BLOCK_BYTES)):
            file.write(i, memoryview(whole)[start : start + _BLOCK_BYTES])
        file.sync()
    return {"slots": list(kv.slots), "leaves": [[list(x.shape), x.dtype.name] for x in arrays]}


def _load_layer(
    path: Path, saved: Mapping[str, Any], generation: int, method: CacheMethod, layer: Layer, dtype: Any
) -> KV:
    """Reads one layer."""
    sizes = [(tuple(shape), jnp.dtype(name)) for shape, name in saved["leaves"]]
    template = _template(sizes, saved["slots"], method, layer, dtype)
    n_bytes = [int(np.prod(shape)) * kind.itemsize for shape, kind in sizes]
    try:
        with blocks.open_blocks(path) as file:
            if file.generation != generation:
                raise blocks.DamagedBlock(
                    f"a file is of the manifest's generation, got {file.generation} for {generation} in "
                    f"{str(path)!r}"
                )
            n = -(-sum(n_bytes) // file.block_bytes)
            whole = b"".join(file.read(i) for i in range(n))
    except FileNotFoundError as error:
        raise blocks.DamagedBlock(
            f"a context has a file for each layer, got none at {str(path)!r}"
        ) from error
    if len(whole) != sum(n_bytes):
        raise blocks.DamagedBlock(f"a layer has {sum(n_bytes)} bytes, got {len(whole)} in {str(path)!r}")
    starts = np.cumsum([0, *n_bytes])
    leaves = [
        jnp.asarray(np.frombuffer(whole[start : start + n], kind).reshape(shape))
        for start, n, (shape, kind) in zip(starts, n_bytes, sizes, strict=False)
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _template(
    sizes: Sequence[tuple], slots: Sequence[int], method: CacheMethod, layer: Layer, dtype: Any
) -> KV:
    """Returns a state of shapes with these leaves: as it is made, or as it is once compressed.

    Raises:
        ValueError: where the method makes neither.
    """
    batch = sizes[0][0][0]
    made = jax.eval_shape(lambda: method.init(layer, batch, tuple(slots), dtype))
    q = jax.ShapeDtypeStruct((batch, method.n_queries, layer.n_kv_heads, layer.group, layer.head_dim), dtype)
    pos = jax.ShapeDtypeStruct((batch, method.n_queries), jnp.int32)
    for kv in (made, jax.eval_shape(method.compress, made, q, pos)):
        if [(x.shape, x.dtype) for x in jax.tree.leaves(kv)] == list(sizes):
            return kv
    raise ValueError(f"a context has the arrays that its method makes, got others than those of {method}")


def _check_space(folder: Path, state: State) -> None:
    """Raises OSError where the disk has too little room."""
    stride = blocks.stride_of(_BLOCK_BYTES)
    needed = sum((-(-measure.nbytes(kv) // _BLOCK_BYTES) + 1) * stride for kv in state)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"a context of {needed / 2**20:.0f} MiB fits its disk, got {free / 2**20:.0f} MiB free for "
            f"{str(folder)!r}: make room, or take another disk"
        )


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a folder."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"one process writes to a folder, got another in {str(folder)!r}") from error
        yield


def _generations(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def _write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Replaces the manifest; a reader sees the old one or the new one."""
    new = folder / "manifest.new"
    with open(new, "w", encoding="utf-8") as file:
        json.dump({"about": about, "xxh3": _digest(about)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / "manifest.json")
    _sync(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
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


def _digest(about: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(about, sort_keys=True).encode())


def _sync(folder: Path) -> None:
    """Waits until a folder's names are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
