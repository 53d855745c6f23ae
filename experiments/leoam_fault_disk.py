"""Breaks the disk below rows that lie on it, or what is stored there, in this process.

A context is saved once with its tokens; each fault has a copy of its folder. What follows the context, the
logits of a few steps, is compared with what followed before it was closed. Each step reads all chunks.
"""

import contextlib
import errno
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

import kvjax
from experiments import leoam_fault_child as child
from experiments import leoam_fault_kills as kills
from kvjax import blocks, disk, reading
from kvjax.blocks import BlockFile
from kvjax.contexts import Context, load_context, recover_context, save_context
from kvjax.disk_pace import Pace
from kvjax.methods.leoam import LeoAM
from kvjax.states import State

__all__ = ["DiskFaults"]

_BLOCKS = ("chunk", "chunk in 4 bits", "first block", "arrays", "manifest", "manifest of chunks")
_FLIPS = 4  # of each kind of block
_FULL = {"prompt": (0, 4, 40, 200), "decoding": (0, 3, 40, 100), "save": (0, 1, 3)}  # after so many blocks
_PROMPT, _STEPS, _ROOM = 96, 32, 64  # of faults in this process: tokens, steps taken, steps to take
_PADDED = 128  # tokens of that prompt as it is read, padded; and of prompt and steps, read anew
_CALL, _CHUNK, _HEADS = 8, 16, 8
_HOST = 700_000  # bytes of chunks in memory: little more than the least
_NEAR = 2e-4  # logits of tokens that were read anew, instead of one by one

_PART, _LATE_S = 700, 0.002  # bytes that a read gives; seconds that it waits
_SAID = {"nothing": "cut short", "a part": "cut short", "arrays": ".blocks", "error": "Input/output error"}
_SYSTEM = Path("/proc/kvjax")  # is written to by nobody, whatever rights it has

Row = dict[str, Any]


@dataclass(eq=False)
class DiskFaults:
    """Faults of a disk and its files, and what they are compared with.

    Args:
        settings: `experiments.leoam_faults.Faults`.
        folder: of all that is written.
    """

    settings: Any
    folder: Path

    def each(self) -> Iterator[tuple[str, str, Callable[[], Row]]]:
        """Yields every fault, a case of it, and what tries it."""
        for kind, i in itertools.product(_BLOCKS, range(_FLIPS)):
            yield "flipped", f"{kind} {i}", functools.partial(self.flipped, kind, i)
        for phase, counts in _FULL.items():
            for n in counts:
                yield "disk full", f"{phase} {n}", functools.partial(self.full, phase, n)
        yield "disk full", "before", self.too_small
        for case in ("nothing", "a part", "arrays", "a page"):
            yield "short read", case, functools.partial(self.reads, case)
        yield "read error", "all", functools.partial(self.reads, "error")
        yield "slow disk", "all", functools.partial(self.reads, "slow")
        yield "two processes", "prompt", self.two
        for case in ("below a file", "a file", "system"):
            yield "refused folder", case, functools.partial(self.refused, case)

    @functools.cached_property
    def model(self) -> kvjax.Model:
        return child.model_of(self.settings.seed, jnp.float32)

    @functools.cached_property
    def reference(self) -> SimpleNamespace:
        """A context that was saved with its tokens: its folder, rows and digest, and what follows."""
        folder, seed = self.folder / "saved", self.settings.seed
        method, ids = _method(folder), child.prompts(_PROMPT, seed)
        taken = np.random.default_rng([seed, 1]).integers(0, self.model.config.vocab_size, (2, _STEPS))
        _, state = kvjax.prefill(self.model, ids, method, room=_ROOM)
        for i in range(0, _STEPS, _CALL):
            state = self._step(state, method, taken[:, i : i + _CALL])[1]
        save_context(folder, self.model, method, state, np.concatenate([ids, taken], axis=1))
        found = {
            "folder": folder,
            "sealed": child.sealed(state),
            "digest": child.digest(state),
            "rows": child.rows(state),
        }
        logits, state = self._step(state, method)
        disk.Disk.of(state).close()
        return SimpleNamespace(**found, logits=logits)

    def _prompt(self, method: LeoAM) -> State:
        """Returns the state after another prompt."""
        return kvjax.prefill(self.model, child.prompts(_PROMPT, 1), method, room=_ROOM)[1]

    def _step(
        self, state: State, method: LeoAM, taken: np.ndarray | None = None, share: float = 0.0
    ) -> tuple[np.ndarray, State]:
        """Returns the logits after each token of a call, and the state.

        share: of chunks that are read in 4 bits, whatever time it is.
        """
        taken = np.arange(2 * _CALL).reshape(2, _CALL) if taken is None else taken
        first = jnp.zeros((2, self.model.config.vocab_size))
        with _patched(Pace, "share", lambda *_: share):
            _, last, state, kept = kvjax.decode(self.model, first, state, method, taken, keep_logits=True)
        return np.concatenate([kept[:, 1:], last[:, None]], axis=1), state

    def _copy(self) -> tuple[Path, LeoAM]:
        """Returns a copy of the saved folder, and a method on it."""
        folder = self.folder / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.reference.folder, folder)
        return folder.resolve(), _method(folder)

    def _unharmed(self, method: LeoAM) -> bool:
        """Returns whether a copy is opened as it was saved, and goes on as that did."""
        state = load_context(method.folder, self.model, method).state
        same = child.digest(state) == self.reference.digest
        return same and np.array_equal(self._step(state, method)[0], self.reference.logits)

    def flipped(self, kind: str, number: int) -> Row:
        """Flips a bit of a kind of block, reads it, and has it repaired where that can be."""
        folder, method = self._copy()
        rng = np.random.default_rng([self.settings.seed, _BLOCKS.index(kind), number])
        path, start, n, named = _place(kind, folder, self.reference.sealed, rng)
        _flip(path, start + int(rng.integers(n)), int(rng.integers(8)))

        def read() -> None:
            if kind == "manifest of chunks":
                recover_context(folder, self.model, method)
            self._step(load_context(folder, self.model, method).state, method, share="4" in kind)

        said = str(_tried(read, ValueError)[1] or "nothing was said")
        noticed = str(path) in said and said.startswith(named)
        mended = self._mended(kind, path, method)
        return {
            "place": f"{path.relative_to(folder)}, {named}" if named else str(path.relative_to(folder)),
            "outcome": f"{said}; {mended or 'not mended'}", "survived": noticed and mended is not None,
        }  # fmt: skip

    def _mended(self, kind: str, path: Path, method: LeoAM) -> str | None:
        """Returns what helps against damage; None if nothing does."""
        if kind == "manifest of chunks":
            return "the save is opened" if self._unharmed(method) else None
        if kind == "manifest":
            state = recover_context(method.folder, self.model, method).state
            seen = np.asarray(state[0].seen).tolist()
            same = seen == self.reference.sealed and child.same(child.rows(state), self.reference.rows, seen)
            return "whole chunks are found" if same else None
        found = load_context(method.folder, self.model, method, repair=True)
        if found.repaired is None or str(path) not in found.repaired:
            return None
        logits = self._step(found.state, method)[0]
        if not np.allclose(logits, self.reference.logits, rtol=0, atol=_NEAR):
            return None
        again = load_context(method.folder, self.model, method, repair=True)
        return "the tokens are read anew" if again.repaired is None else None

    def full(self, phase: str, blocks_left: int) -> Row:
        """Lets the disk take so many blocks of what follows a saved context; they are written behind."""
        _, method = self._copy()
        steps, met = self._followed(phase, method), None
        next(steps)
        with _full_after(blocks_left) as refused:
            for number in itertools.count():
                last, error = _tried(lambda: next(steps, "last"), OSError)
                met = number if met is None and refused else met
                if error is not None or last:
                    break
        told = met is not None and error is not None and error.errno == errno.ENOSPC and number - met <= 1
        unharmed = self._unharmed(method)
        return {
            "place": phase, "survived": told and unharmed,
            "outcome": f"{error or 'nothing was said'} in call {number}, met in {met}; the save from before "
            + ("is opened" if unharmed else "is lost"),
        }  # fmt: skip

    def _followed(self, phase: str, method: LeoAM) -> Iterator[None]:
        """Prepares, and yields; then after each call that writes blocks. The last one waits for them."""
        if phase == "prompt":
            yield
            state = self._prompt(method)
        else:
            state = load_context(method.folder, self.model, method).state
            if phase == "save":
                state = self._step(state, method)[1]
                disk.Disk.of(state).sync()
            yield
            if phase == "save":
                save_context(method.folder, self.model, method, state)
            for _ in range(0, _ROOM - _CALL, _CALL):
                state = self._step(state, method)[1]
                yield
        yield
        disk.Disk.of(state).sync()

    def too_small(self) -> Row:
        """Asks for a new prompt where the disk has too little room for it."""
        folder, method = self._copy()
        usage, ran = shutil.disk_usage(folder)._replace(free=10_000), []
        with (
            _patched(shutil, "disk_usage", lambda _: usage),
            _patched(reading, "_read", lambda *_, **__: ran.append(1)),
        ):
            error = _tried(lambda: self._prompt(method), OSError)[1]
        told = error is not None and "fits its disk" in str(error) and not ran
        return {"place": "prompt", "outcome": str(error), "survived": told and self._unharmed(method)}

    def reads(self, case: str) -> Row:
        """Goes on with a context, or opens it, while reads are not as they should be."""
        _, method = self._copy()
        found = None if case == "arrays" else load_context(method.folder, self.model, method)
        with _reading(case):
            logits, error = _tried(lambda: self._gone_on(found, method), (OSError, ValueError))
        if case in ("a page", "slow"):
            survived = error is None and np.array_equal(logits, self.reference.logits)
        else:
            survived = error is not None and _SAID[case] in str(error)
        said = str(error or "the same logits" if survived else "other logits")
        return {"place": "arrays" if case == "arrays" else "chunks", "outcome": said, "survived": survived}

    def _gone_on(self, found: Context | None, method: LeoAM) -> np.ndarray:
        """Returns the logits after a context, which is opened where it is not given."""
        found = found or load_context(method.folder, self.model, method)
        return self._step(found.state, method)[0]

    def two(self) -> Row:
        """Has another process ask for the folder of a state that goes on."""
        folder, method = self._copy()
        state = load_context(folder, self.model, method).state
        error = _tried(lambda: kills.run(self.settings, self.folder, folder=str(folder)), RuntimeError)[1]
        refused = error is not None and "ValueError: one process writes to a folder" in str(error)
        same = np.array_equal(self._step(state, method)[0], self.reference.logits)
        said = f"{str(error).splitlines()[-1]}; the first one goes on {'as it was' if same else 'otherwise'}"
        return {"place": "lock", "outcome": said, "survived": refused and same}

    def refused(self, case: str) -> Row:
        """Asks for a folder where none can be."""
        (file := self.folder / "file").touch()
        folder = {"a file": file, "below a file": file / "folder", "system": _SYSTEM}[case]
        error = _tried(lambda: self._prompt(_method(folder)), OSError)[1]
        told = error is not None and str(folder) in str(error)
        return {"place": folder.name, "outcome": str(error), "survived": told}


def _method(folder: Path) -> LeoAM:
    """Returns a method that reads all, so that steps read as prompts do, and holds little of it."""
    return child.method_on(folder, topk=1.0, host_budget=_HOST, int4=True)


def _place(
    kind: str, folder: Path, sealed: list[int], rng: np.random.Generator
) -> tuple[Path, int, int, str]:
    """Returns a file with such a block, where that begins, its bytes, and what else names it."""
    layer, chunks, saved = int(rng.integers(2)), folder / "00000001", folder / "00000002"
    if kind.startswith("manifest"):
        path = (folder if kind == "manifest" else chunks) / "manifest.json"
        return path, 0, path.stat().st_size, ""
    if kind == "first block":
        return chunks / f"{layer:03}.chunks{rng.choice(['', '4'])}", 0, blocks.ALIGN, ""
    path = (
        saved / f"{layer:03}.blocks"
        if kind == "arrays"
        else chunks / f"{layer:03}.chunks{'4' * ('4' in kind)}"
    )
    with blocks.open_blocks(path) as file:
        stride = file.stride
    if kind == "arrays":
        return path, int(rng.integers(1, path.stat().st_size // stride)) * stride, stride, ""
    row, head = int(rng.integers(2)), int(rng.integers(_HEADS))
    number = int(rng.integers(sealed[row] // _CHUNK))
    named = f"tokens {number * _CHUNK} to {(number + 1) * _CHUNK - 1} of KV head {head}, row {row}"
    n_chunks = -(-(_PADDED + _ROOM) // _CHUNK)
    return path, ((row * _HEADS + head) * n_chunks + number + 1) * stride, stride, named


def _flip(path: Path, place: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)


def _tried(call: Callable[[], Any], kinds: Any) -> tuple[Any, Exception | None]:
    """Returns what a call returns, and what it raises of these kinds."""
    try:
        return call(), None
    except kinds as error:
        return None, error


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives a module or a class something else by a name, for a while."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextlib.contextmanager
def _full_after(blocks_left: int) -> Iterator[list[int]]:
    """Makes a disk that takes so many blocks; yields the places that it refused."""
    write, calls, refused = os.pwrite, itertools.count(), []

    def some(handle: int, data: Any, place: int) -> int:
        if next(calls) >= blocks_left:
            refused.append(place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, place)

    with _patched(os, "pwrite", some):
        yield refused


@contextlib.contextmanager
def _reading(case: str) -> Iterator[None]:
    """Makes a disk whose reads are short, fail, or wait."""
    read, whole = os.preadv, BlockFile.read_run

    def other(handle: int, places: list, at: int) -> int:
        if case == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if case == "nothing":
            return 0
        if case == "a page":
            return read(handle, [places[0][: blocks.ALIGN]], at)
        return min(read(handle, places, at), _PART)  # one past the cache reads whole pages

    def late(*args: Any) -> list[memoryview]:
        time.sleep(_LATE_S)
        return whole(*args)

    with _patched(BlockFile, "read_run", late) if case == "slow" else _patched(os, "preadv", other):
        yield
