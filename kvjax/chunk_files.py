"""Writes and reads the chunks of a layer on disk, by their numbers.

    chunk    P neighbouring slots of a KV head, keys beside values: a block of a file, see `blocks`
    number   chunks count head after head, row after row; those of a head lie one after the other

A chunk is written behind, by a thread, and found in memory until it is there. It may be stored a second time
in 4 bits, in a file of its own. Any thread may read.

Source: LeoAM (arXiv 2506.20187), its disk tier; the form is ours.
"""

import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kvjax import blocks
from kvjax.blocks import BlockFile, DamagedBlock
from kvjax.chunk_codes import decode4, encode4
from kvjax.disk_pace import Traffic

__all__ = ["ChunkFiles", "Layout"]

_PENDING = 2**27  # bytes that may wait to be written
_RUN = 2**20  # bytes that are read at once where neighbours are asked for


@dataclass(frozen=True)
class Layout:
    """The shape of a layer: B rows of K heads of S slots, in chunks of P."""

    batch: int
    n_heads: int
    slots: int
    head_dim: int
    dtype: Any
    chunk: int

    @property
    def n_chunks(self) -> int:
        """Chunks of a head."""
        return -(-self.slots // self.chunk)

    @property
    def n_blocks(self) -> int:
        """Chunks of the layer."""
        return self.batch * self.n_heads * self.n_chunks

    @property
    def rows(self) -> tuple[int, int, int]:
        """The shape of a chunk, [P 2 D]."""
        return self.chunk, 2, self.head_dim

    @property
    def chunk_bytes(self) -> int:
        """The bytes of a chunk's rows."""
        return int(np.prod(self.rows)) * np.dtype(self.dtype).itemsize

    @property
    def stride(self) -> int:
        """The bytes that a chunk takes on disk, and in host memory."""
        return blocks.stride_of(self.chunk_bytes)

    def number(self, row: Any, head: Any, chunk: Any) -> Any:
        """Returns the number of a chunk of a head."""
        return (row * self.n_heads + head) * self.n_chunks + chunk

    def full(self, end: Int[np.ndarray, "B K"]) -> Int[np.ndarray, " N"]:
        """Returns the numbers of the chunks that are full, where heads have so many slots in use."""
        return np.flatnonzero(np.arange(self.n_chunks) < end[..., None] // self.chunk)

    def named(self, number: int) -> str:
        """Says which tokens a chunk holds."""
        row, rest = divmod(number, self.n_heads * self.n_chunks)
        head, chunk = divmod(rest, self.n_chunks)
        first = chunk * self.chunk
        return f"tokens {first} to {first + self.chunk - 1} of KV head {head}, row {row}"


class ChunkFiles:
    """One layer's chunks on disk, and those that wait to get there."""

    def __init__(
        self, layout: Layout, whole: BlockFile, small: BlockFile | None, threads: ThreadPoolExecutor,
        traffic: Traffic,
    ) -> None:  # fmt: skip
        """Takes files that hold what was sealed before, or nothing.

        whole: of chunks as they are. small: of the same in 4 bits, or None.
        """
        self.layout, self.whole, self.small = layout, whole, small
        self.failure: Exception | None = None
        self._threads, self._traffic = threads, traffic
        self._unwritten: dict[int, np.ndarray] = {}  # chunks that no thread has written yet
        self._writes: deque[Future] = deque()
        self._counting = threading.Lock()

    @property
    def both(self) -> list[BlockFile]:
        """The files that there are."""
        return [file for file in (self.whole, self.small) if file is not None]

    def room(self, n: int = 1) -> memoryview:
        """Returns memory for n chunks, that begins on a page as direct reads want."""
        return memoryview(mmap.mmap(-1, n * self.layout.stride))

    def write(self, numbers: np.ndarray, rows: Float[np.ndarray, "N P 2 D"]) -> None:
        """Has chunks written; waits where too many wait already."""
        while len(self._writes) * self.layout.chunk_bytes > _PENDING:
            self._writes.popleft().exception()
        for number, own in zip(numbers.tolist(), rows, strict=True):
            self._unwritten[number] = own
            self._writes.append(self._threads.submit(self._write, number, own))

    def _write(self, number: int, rows: np.ndarray) -> None:
        """Writes a chunk; runs in a thread."""
        with self.caught():
            self.whole.write(number, memoryview(rows.view(np.uint8).reshape(-1)))
            if self.small is not None:
                self.small.write(number, encode4(rows))
            del self._unwritten[number]

    def waiting(self, number: int) -> Float[np.ndarray, "P 2 D"] | None:
        """Returns a chunk that waits to be written."""
        return self._unwritten.get(number)

    def read_into(self, numbers: list[int], places: list[memoryview]) -> None:
        """Reads chunks as they are, each to the beginning of a place, a stride of bytes.

        Raises:
            DamagedBlock: which names the tokens of the first that is damaged.
            OSError: where the disk fails.
        """
        with self._named():
            for number, place in zip(numbers, places, strict=True):
                self.whole.read_into(number, place)
        self._count(read_bytes=len(numbers) * self.layout.stride)

    def read4(self, number: int, room: memoryview) -> Float[np.ndarray, "P 2 D"]:
        """Returns a chunk from its 4 bits, which are read into `room`; raises as `read_into`."""
        with self._named():
            found = self.small.read_into(number, room[: self.small.stride])
        self._count(read4_bytes=self.small.stride)
        return decode4(found, self.layout.rows, self.layout.dtype)

    def copy(self, numbers: list[int], to: np.ndarray, out: Float[np.ndarray, "N P 2 D"]) -> None:
        """Copies chunks as they are to out[to], neighbours on disk at once; raises as `read_into`."""
        layout, most = self.layout, max(1, _RUN // self.layout.stride)
        room, at = self.room(max(1, min(most, len(numbers)))), 0
        payloads = np.frombuffer(room, np.uint8).reshape(-1, layout.stride)[:, : layout.chunk_bytes]
        rows = payloads.view(layout.dtype).reshape(-1, *layout.rows)
        while at < len(numbers):
            n, found = 0, None
            for number in numbers[at : at + most]:
                if number != numbers[at] + n or (found := self.waiting(number)) is not None:
                    break
                n += 1
            if not n:
                out[to[at]] = found
                at += 1
                continue
            with self._named():
                self.whole.read_run(numbers[at], n, room)
            out[to[at : at + n]] = rows[:n]
            self._count(read_bytes=n * layout.stride)
            at += n

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Says which tokens a chunk holds that is damaged."""
        try:
            yield
        except DamagedBlock as error:
            raise DamagedBlock(f"{self.layout.named(error.number)}: {error}", error.number) from error

    def _count(self, **n_bytes: int) -> None:
        """Adds to the bytes that have been read."""
        with self._counting:
            for name, n in n_bytes.items():
                setattr(self._traffic, name, getattr(self._traffic, name) + n)

    def ends(self) -> Int[np.ndarray, "B K"]:
        """Returns the slots of each head that are on disk, before the first chunk that is not whole."""
        layout, room = self.layout, self.room()
        end = np.zeros((layout.batch, layout.n_heads), np.int64)
        for row, head in np.ndindex(*end.shape):
            n = 0
            with contextlib.suppress(DamagedBlock):
                while n < layout.slots // layout.chunk:
                    self.whole.read_into(layout.number(row, head, n), room)
                    n += 1
            end[row, head] = n * layout.chunk
        return end

    def forget(self, end: Int[np.ndarray, "B K"]) -> None:
        """Breaks the seals of chunks beyond the ends of heads."""
        for row, head in np.ndindex(*end.shape):
            for chunk in range(end[row, head] // self.layout.chunk, self.layout.n_chunks):
                for file in self.both:
                    file.erase(self.layout.number(row, head, chunk))

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Keeps the first error for `check`: one that leaves a callback ends the program without its name."""
        try:
            yield
        except (OSError, DamagedBlock) as error:
            self.failure = self.failure or error

    def check(self) -> None:
        """Raises what has failed.

        Raises:
            DamagedBlock: for a chunk that is not what was written.
            OSError: where the disk fails.
        """
        if self.failure is not None:
            raise self.failure

    def settle(self) -> None:
        """Waits until all chunks are written, and raises what has failed, see `check`."""
        while self._writes:
            self._writes.popleft().exception()
        self.check()

    def sync(self) -> None:
        """As `settle`, and all of it is on the disk for good."""
        self.settle()
        for file in self.both:
            file.sync()

    def close(self) -> None:
        """Closes the files once nothing waits to be written."""
        for task in self._writes:
            task.exception()
        for file in self.both:
            file.close()
