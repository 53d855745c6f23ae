"""Ties the layers of a state to their chunks on a disk, which programs ask for while they run.

A state has no rows of such a layer but the number of its `chunk_store.Store`, as a process knows a file by
a number. So a state that is given to a step is consumed, as its arrays are; and a folder serves one state:
a new one in the same folder closes what was open there. Stores share threads, a lock on the folder, and what
is known of the disk's pace.

Source: LeoAM (arXiv 2506.20187), its three tiers.
"""

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from kvjax import blocks, context_folder
from kvjax.blocks import DamagedBlock
from kvjax.chunk_codes import bytes4
from kvjax.chunk_files import Layout
from kvjax.chunk_store import Store
from kvjax.disk_pace import Pace, Traffic
from kvjax.disk_threads import Threads
from kvjax.shapes import Leaf
from pallas_kernels.backend import call_host
from pallas_kernels.host import pinned

__all__ = ["Disk", "Remote", "append", "attach", "check", "expect", "fetch", "traffic"]

_THREADS = 16  # of each kind
_LANDING = 2**26  # bytes of a result that a GPU copies from pinned memory; its stream asks for one at a time


@struct.dataclass
class Remote:
    """The rows of a layer on disk, as a program sees them."""

    number: Leaf  # [] int32, of the store; -1 = none yet
    chunk: int = struct.field(pytree_node=False)  # slots that are written, and read, together
    pool_bytes: int | None = struct.field(pytree_node=False)  # of chunks in host memory; None = all
    int4: bool = struct.field(pytree_node=False)  # a share may be read in 4 bits
    ahead: bool = struct.field(
        pytree_node=False, default=True
    )  # what a layer may ask for is read before it does


@dataclass(eq=False)
class Disk:
    """What the layers of a state share: a generation of a folder, open for as long as the state is used."""

    folder: Path
    generation: int
    lock: TextIO
    stores: dict[int, Store] = field(default_factory=dict)  # by layer
    numbers: dict[int, Store] = field(default_factory=dict)
    threads: Threads = field(default_factory=lambda: Threads(_THREADS))
    pace: Pace = field(default_factory=Pace)
    landing: np.ndarray | None = field(default_factory=lambda: pinned(_LANDING))
    rooms: list[np.ndarray] = field(default_factory=list)

    by_folder: ClassVar[dict[Path, "Disk"]] = {}
    count: ClassVar[itertools.count] = itertools.count()

    @classmethod
    def of(cls, state: Sequence[Any]) -> "Disk | None":
        """Returns what a state lies on; None for a state without such layers.

        Raises:
            ValueError: for a state that was closed.
        """
        numbers = [int(kv.tier.far.number) for kv in state if on_disk(kv)]
        if not numbers:
            return None
        for disk in cls.by_folder.values():
            if numbers[0] in disk.numbers:
                return disk
        raise ValueError("a folder serves one state, got one that is closed: load its context again")

    def close(self) -> None:
        """Waits for what is under way, and lets the folder go. Nothing where that was done before."""
        if self.by_folder.get(self.folder) is not self:
            return
        del self.by_folder[self.folder]
        for store in self.stores.values():
            store.close()
        self.threads.shutdown()
        self.lock.close()

    @classmethod
    def close_all(cls) -> None:
        """Closes all that are open."""
        for disk in list(cls.by_folder.values()):
            disk.close()

    def sync(self) -> None:
        """Waits until all full chunks are on the disk for good.

        Raises:
            DamagedBlock, OSError: what has failed since the state was made.
        """
        for store in self.stores.values():
            store.sync()

    def add(self, index: int, store: Store) -> int:
        """Takes a layer's store and returns its number."""
        number = next(self.count)
        self.stores[index] = self.numbers[number] = store
        return number


def on_disk(kv: Any) -> bool:
    """Returns whether a layer's rows lie on a disk."""
    return kv.tier is not None and isinstance(kv.tier.far, Remote)


def reads_ahead(kv: Any) -> bool:
    """Returns whether what a layer may ask for is read before it does: not where the host has it all."""
    if not on_disk(kv) or not kv.tier.far.ahead:
        return False
    layout = layout_of(kv)
    return pool_bytes(kv) < layout.n_blocks * layout.stride


def attach(state: Sequence[Any], folder: Path | str, about: Mapping[str, Any]) -> tuple:
    """Gives the layers of an empty state that lie on a disk a new generation of a folder.

    What is in the folder and was not saved is removed.

    Args:
        about: whose state it is, see `context_folder.identity`.

    Raises:
        ValueError: where another process uses the folder.
        OSError: where it cannot be written to, or has too little room for all slots.
    """
    disk = opened(folder)
    try:
        context_folder.sweep(disk.folder)
        layouts = {i: layout_of(kv) for i, kv in enumerate(state) if on_disk(kv)}
        parts = context_folder.new_generation(disk.folder)
        disk.generation = int(parts.name)
        needed = sum(file_bytes(layouts[i], state[i].tier.far) for i in layouts)
        context_folder.check_space(disk.folder, needed)
        made = []
        for i, kv in enumerate(state):
            if i in layouts:
                files = _create(parts, i, layouts[i], kv.tier.far, disk.generation)
                kv = connected(disk, i, kv, files)
            made.append(kv)
        shape = {"chunks": disk.generation, "batch": len(made[0].seen), "slots": [kv.slots for kv in made]}
        context_folder.write_manifest(parts, {**about, **shape})
    except BaseException:
        disk.close()
        raise
    return tuple(made)


def opened(folder: Path | str) -> Disk:
    """Locks a folder for a state; one that used it in this process is closed."""
    path = Path(folder).resolve()
    if (old := Disk.by_folder.get(path)) is not None:
        old.close()
    disk = Disk(path, 0, context_folder.lock(path))
    Disk.by_folder[path] = disk
    return disk


def layout_of(kv: Any) -> Layout:
    """Returns the shape of a layer's rows on disk."""
    batch, n_heads, _, size = kv.tier.new_k.shape
    return Layout(batch, n_heads, max(kv.slots), size, np.dtype(kv.tier.new_k.dtype), kv.tier.far.chunk)


def file_bytes(layout: Layout, far: Remote) -> int:
    """Returns the bytes of a layer's files once all slots are full."""
    return (layout.n_blocks + 1) * (layout.stride + far.int4 * blocks.stride_of(bytes4(layout.rows)))


def pool_bytes(kv: Any) -> int:
    """Returns the host memory that a layer's chunks take."""
    layout, most = layout_of(kv), kv.tier.far.pool_bytes
    n = layout.n_blocks if most is None else min(most // layout.stride, layout.n_blocks)
    return n * layout.stride


def connected(disk: Disk, index: int, kv: Any, files: tuple) -> Any:
    """Returns a layer's state with the number of a store that has these files."""
    layout = layout_of(kv)
    n_pool = pool_bytes(kv) // layout.stride
    number = disk.add(index, Store(layout, n_pool, files, disk.threads, disk.pace, disk.landing, disk.rooms))
    far = kv.tier.far.replace(number=jnp.int32(number))
    return kv.replace(tier=kv.tier.replace(far=far))


def reopened(disk: Disk, index: int, kv: Any) -> Any:
    """Returns a layer's state with the number of a store of what its files hold.

    Raises:
        DamagedBlock: where a file is missing, or of another generation.
    """
    parts = disk.folder / f"{disk.generation:08}"
    names = [f"{index:03}.chunks", f"{index:03}.chunks4"][: 1 + kv.tier.far.int4]
    with contextlib.ExitStack() as stack:  # closes them where one of them cannot be taken
        files = []
        for path in (parts / name for name in names):
            try:
                files.append(stack.enter_context(blocks.open_blocks(path, writable=True)))
            except FileNotFoundError as error:
                raise DamagedBlock(f"a layer's rows lie in a file, got none at {str(path)!r}") from error
            if files[-1].generation != disk.generation:
                raise DamagedBlock(
                    f"a file is of its folder's generation, got {files[-1].generation} in {str(path)!r}"
                )
        made = connected(disk, index, kv, (*files, None)[:2])
        stack.pop_all()
    return made


def _create(parts: Path, index: int, layout: Layout, far: Remote, generation: int) -> tuple:
    """Makes a layer's files."""
    whole = blocks.create(parts / f"{index:03}.chunks", layout.chunk_bytes, generation)
    if not far.int4:
        return whole, None
    return whole, blocks.create(parts / f"{index:03}.chunks4", bytes4(layout.rows), generation)


def append(kv: Any) -> None:
    """Gives a layer's store the rows that are staged on the device."""
    tier, store = kv.tier, _store(kv.tier.far.number)
    first, end = np.asarray(tier.first), np.asarray(kv.fill)
    n = int((end - first).max())
    if n:
        rows = np.stack([np.asarray(x[:, :, :n]) for x in (tier.new_k, tier.new_v)], axis=3)
        store.append(first, rows, end)
    store.check()


def check(state: Iterable[Any]) -> None:
    """Raises what has failed while programs ran: DamagedBlock or OSError."""
    for kv in state:
        if on_disk(kv):
            _store(kv.tier.far.number).check()


def fetch(far: Remote, at: Int[Array, "3 M"], like: Any, *, whole: bool = False) -> Float[Array, "M P 2 D"]:
    """Returns leaves of P slots; a program waits for them here.

    Args:
        at: row, head and leaf of each; -1 for none.
        like: of their shape [P 2 D] and type.
        whole: they are chunks, and all of a layer is read: as it was given, and past the pool.
    """

    def read(asked: Any) -> np.ndarray:
        store, at = _asked(asked)
        return store.read_past(*at) if whole else store.read(*at, like.shape[0])

    result = jax.ShapeDtypeStruct((at.shape[1], *like.shape), like.dtype)
    return call_host(read, result, _asking(far, at))


def expect(far: Remote, leaf: Int[Array, "B K N"] | None, size: int) -> Float[Array, ""]:
    """Has leaves of `size` slots, or all rows, read into host memory for what follows in this program.

    Returns: 0, once reading has begun: what asks for them is to depend on it.
    """

    def start(asked: Any) -> np.ndarray:
        store, at = _asked(asked)
        store.expect(*at, size) if leaf is not None else store.expect_all()
        return np.zeros((), np.float32)

    at = jnp.zeros((3, 0), jnp.int32)
    if leaf is not None:
        row, head, _ = np.indices(leaf.shape, np.int32)
        at = jnp.stack([row.reshape(-1), head.reshape(-1), leaf.reshape(-1)])
    return call_host(start, jax.ShapeDtypeStruct((), jnp.float32), _asking(far, at))


def _asking(far: Remote, at: Int[Array, "3 M"]) -> Int[Array, " Q"]:
    """Returns what is asked of which store, as one array: each that a program hands over takes time."""
    return jnp.concatenate([far.number[None], at.reshape(-1)])


def _asked(asked: Any) -> tuple[Store, Int[np.ndarray, "3 M"]]:
    """Returns a store, and what is asked of it."""
    asked = np.asarray(asked)
    return _store(asked[0]), asked[1:].reshape(3, -1).astype(np.int64)


def traffic(state: Sequence[Any]) -> list[Traffic]:
    """Returns what has moved, for each layer on a disk."""
    return [_store(kv.tier.far.number).traffic for kv in state if on_disk(kv)]


def _store(number: Any) -> Store:
    """Returns a store by its number.

    Raises:
        ValueError: for one that was closed.
    """
    for disk in Disk.by_folder.values():
        if (store := disk.numbers.get(int(number))) is not None:
            return store
    raise ValueError("a folder serves one state, got one that is closed: load its context again")
