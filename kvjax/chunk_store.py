"""Keeps the rows of one layer on disk, and in host memory a pool of those that were asked for last.

    chunk    P neighbouring slots of a KV head, keys beside values: a block of a file, see `blocks`
    tail     the chunk of each head that is not full yet: in host memory alone
    pool     chunks in host memory; of those that nothing waits for, the ones asked for longest ago make room

A full chunk is written behind, once, by a thread, and never again. Threads read ahead what `expect` names,
past the page cache where the file system can. With `int4` a chunk is stored a second time in 4 bits, and a
share of what a step waits for is read in that form: the least that lets the disk keep up with the device.

Source: LeoAM (arXiv 2506.20187), its three tiers and dynamic compression; the formulas are ours.
"""

import contextlib
import mmap
import threading
import time
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
from kvjax.disk_pace import Pace, Traffic

__all__ = ["Layout", "Store"]

_PENDING = 2**27  # bytes that may wait to be written
_TASKS = 16  # that one call gives the threads
_PART = 1024  # chunks that are brought together where a whole layer is read


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
        """The bytes that a chunk takes on disk, and in the pool."""
        return blocks.stride_of(self.chunk_bytes)


class Store:
    """One layer's chunks. It changes in place, under a lock; programs know it by a number."""

    def __init__(
        self, layout: Layout, n_pool: int, files: tuple[BlockFile, BlockFile | None],
        threads: ThreadPoolExecutor, pace: Pace, landing: np.ndarray | None = None,
        rooms: list[np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """Takes files that hold what was sealed before, or nothing.

        files: of chunks as they are; and in 4 bits, or None.
        landing: bytes that results are written to where they fit: one call's are gone with the next.
        rooms: memory for a whole layer that `expect_all` takes, of stores that are alike.
        """
        self._landing = landing
        self.layout, self.traffic, self.pace = layout, Traffic(), pace
        self.file, self.small = files
        self.end = np.zeros((layout.batch, layout.n_heads), np.int64)  # slots that are here
        self.tail = np.zeros((layout.batch, layout.n_heads, *layout.rows), layout.dtype)
        self.failure: Exception | None = None
        self._threads, self._lock, self._clock = threads, threading.RLock(), 0
        memory = mmap.mmap(-1, n_pool * layout.stride)  # begins on a page, as direct reads want
        self._memory = memoryview(memory)
        rows = np.frombuffer(memory, np.uint8).reshape(n_pool, layout.stride)[:, : layout.chunk_bytes]
        self._pool = rows.view(layout.dtype).reshape(n_pool, *layout.rows)
        self._place = np.full(layout.n_blocks, -1, np.int64)  # of each chunk in the pool
        self._holds = np.full(n_pool, -1, np.int64)  # the chunk at each place
        self._used = np.full(n_pool, -1, np.int64)  # -1 is free
        self._coarse = np.zeros(n_pool, bool)  # read in 4 bits
        self._early = np.zeros(n_pool, bool)  # read ahead, and not asked for yet
        self._coming: dict[int, Future] = {}  # chunks that a thread reads
        self._unwritten: dict[int, np.ndarray] = {}  # chunks that no thread has written yet
        self._writes: deque[Future] = deque()
        self._counting = threading.Lock()
        self._rooms: list[np.ndarray] = [] if rooms is None else rooms
        self._whole: tuple[np.ndarray, list[Future], int] | None = None  # room, tasks, chunks left

    def append(self, first: Int[np.ndarray, "B K"], rows: Float[np.ndarray, "B K W 2 D"], end: Any) -> None:
        """Takes slots first to end of each head; chunks that get full are written behind.

        Raises:
            ValueError: for slots that do not follow those that are here.
        """
        if (first != self.end).any():
            raise ValueError(f"slots follow each other, got {first.tolist()} after {self.end.tolist()}")
        with self._lock:
            for row in range(self.layout.batch):
                n, start = int(end[row, 0] - first[row, 0]), int(first[row, 0])
                done = 0
                while done < n:
                    inside = (start + done) % self.layout.chunk
                    some = min(n - done, self.layout.chunk - inside)
                    self.tail[row, :, inside : inside + some] = rows[row, :, done : done + some]
                    done += some
                    self.end[row] = start + done
                    if inside + some == self.layout.chunk:
                        self._seal(row, (start + done) // self.layout.chunk - 1)

    def read(
        self, row: np.ndarray, head: np.ndarray, leaf: np.ndarray, size: int
    ) -> Float[np.ndarray, "M P 2 D"]:
        """Returns leaves, `size` slots each; those at or beyond a head's end hold anything.

        Args:
            leaf: the number of each in its head; -1 is none.
        """
        started = time.perf_counter()
        out = self._out(len(leaf), size, *self.layout.rows[1:])
        with self._lock, self._caught():
            self.pace.entered(started)
            first = leaf * size
            chunk, inside = first // self.layout.chunk, first % self.layout.chunk // size
            there = (leaf >= 0) & (first < self.end[row, head])
            full = there & (chunk < self.end[row, head] // self.layout.chunk)
            number = np.where(full, (row * self.layout.n_heads + head) * self.layout.n_chunks + chunk, -1)
            leaves = self._pool.reshape(len(self._pool), -1, size, *self.layout.rows[1:])
            wanted, count = np.unique(number[full], return_counts=True)
            for start in range(0, len(wanted), len(self._pool)):
                part = slice(start, start + len(self._pool))
                self._bring(wanted[part], count[part])
                here = full & (self._place[number] >= 0)
                out[here] = leaves[self._place[number[here]], inside[here]]
                full &= ~here
            last = there & (number < 0)
            tails = self.tail.reshape(*self.tail.shape[:2], -1, *leaves.shape[2:])
            out[last] = tails[row[last], head[last], inside[last]]
            self.traffic.sent_bytes += int(there.sum()) * out[:1].nbytes
        now = time.perf_counter()
        self.traffic.busy_s += now - started
        self.pace.left(now)
        return out

    def _out(self, *shape: int) -> np.ndarray:
        """Returns room for a result."""
        n_bytes = int(np.prod(shape)) * np.dtype(self.layout.dtype).itemsize
        if self._landing is None or n_bytes > self._landing.size:
            return np.zeros(shape, self.layout.dtype)
        return self._landing[:n_bytes].view(self.layout.dtype).reshape(shape)

    def expect(self, row: np.ndarray, head: np.ndarray, leaf: np.ndarray, size: int) -> None:
        """Has threads read the chunks of leaves, and does not wait."""
        started = time.perf_counter()
        with self._lock, self._caught():
            chunk = leaf * size // self.layout.chunk
            full = (leaf >= 0) & (chunk < self.end[row, head] // self.layout.chunk)
            number = ((row * self.layout.n_heads + head) * self.layout.n_chunks + chunk)[full]
            number, count = np.unique(number, return_counts=True)
            new = self._place[number] < 0
            number, count = number[new], count[new]
            most = len(self._pool) // 2  # what is expected drives out no more than that
            if len(number) > most:
                best = np.argsort(-count, kind="stable")[:most]
                number, count = number[best], count[best]
            if len(number):
                self._start(number, count)
                self._early[self._place[number]] = True
        self.traffic.busy_s += time.perf_counter() - started

    def expect_all(self) -> None:
        """Has threads read all full chunks, for `read_past`, and does not wait."""
        started = time.perf_counter()
        with self._lock, self._caught():
            full = np.arange(self.layout.n_chunks) < self.end[..., None] // self.layout.chunk
            shape = (self.layout.n_blocks, *self.layout.rows)
            room = self._rooms.pop() if self._rooms else np.empty(shape, self.layout.dtype)
            numbers = np.flatnonzero(full)
            self._whole = room, self._copied(numbers, numbers, room), len(numbers)
        self.traffic.busy_s += time.perf_counter() - started

    def read_past(self, row: np.ndarray, head: np.ndarray, chunk: np.ndarray) -> Float[np.ndarray, "M P 2 D"]:
        """Returns whole chunks as they were given, -1 for none, and leaves the pool as it is.

        Of a head's last chunk, what it does not have yet holds anything.
        """
        started = time.perf_counter()
        with self._lock, self._caught():
            self.pace.entered(started)
            out = self._out(len(chunk), *self.layout.rows)
            last = self.end[row, head] // self.layout.chunk
            number = (row * self.layout.n_heads + head) * self.layout.n_chunks + chunk
            full = (chunk >= 0) & (chunk < last)
            number, to = number[full], np.flatnonzero(full)
            room, tasks, left = self._whole or (None, self._copied(number, to, out), 0)
            for task in tasks:
                task.result()
            if room is not None:
                for task in self._copied(number, to, out, room):
                    task.result()
                left -= len(number)
                self._whole = (room, [], left) if left > 0 else None
                self._rooms.extend([room] * (left <= 0))
            tail = (chunk >= 0) & (chunk == last)
            out[tail] = self.tail[row[tail], head[tail]]
            self.traffic.sent_bytes += int((full | tail).sum()) * self.layout.chunk_bytes
        now = time.perf_counter()
        self.traffic.waited_s += now - started
        self.traffic.busy_s += now - started
        self.pace.left(now)
        return out

    def everything(self) -> Float[np.ndarray, "B K S 2 D"]:
        """Returns all rows as they were given; those from a head's end on hold anything."""
        shape = (self.layout.batch, self.layout.n_heads, self.layout.n_chunks)
        at = [x.reshape(-1) for x in np.indices(shape)]
        parts = (slice(i, i + _PART) for i in range(0, len(at[0]), _PART))
        rows = np.concatenate([self.read_past(*(x[part] for x in at)).copy() for part in parts])
        return rows.reshape(*shape[:2], -1, *self.layout.rows[1:])[:, :, : self.layout.slots]

    def _copied(
        self, numbers: np.ndarray, to: np.ndarray, out: np.ndarray, room: np.ndarray | None = None
    ) -> list[Future]:
        """Has threads copy chunks to out[to] from the pool and the disk, or from a room for all of them."""
        for n in list(self._coming):
            self._finish(n)
        place = self._place[numbers]
        place = np.where(self._coarse[place], -1, place) if room is None else numbers
        room = self._pool if room is None else room
        parts = np.array_split(np.arange(len(numbers)), _TASKS)
        tasks = ((numbers[i], place[i], to[i]) for i in parts if len(i))
        return [self._threads.submit(self._copy, *task, room, out) for task in tasks]

    def _copy(
        self, numbers: np.ndarray, places: np.ndarray, to: np.ndarray, room: np.ndarray, out: np.ndarray
    ) -> None:
        """Copies chunks from their places in host memory, or reads them past it; runs in a thread."""
        scratch, n_bytes = memoryview(mmap.mmap(-1, self.layout.stride)), 0
        for number, place, i in zip(numbers.tolist(), places.tolist(), to.tolist(), strict=True):
            if place >= 0:
                found = room[place]
            elif (found := self._unwritten.get(number)) is None:
                stored = self._checked(self.file, number, scratch)
                found = np.frombuffer(stored, self.layout.dtype).reshape(self.layout.rows)
                n_bytes += self.layout.stride
            out[i] = found
        with self._counting:
            self.traffic.read_bytes += n_bytes

    def find(self) -> None:
        """Takes what is on the disk: of each head, the chunks before the first that is not whole."""
        shape = (self.layout.batch, self.layout.n_heads)
        scratch = memoryview(mmap.mmap(-1, self.layout.stride))
        for row, head in np.ndindex(*shape):
            first, n = (row * shape[1] + head) * self.layout.n_chunks, 0
            with contextlib.suppress(DamagedBlock):
                while n < self.layout.slots // self.layout.chunk:
                    self.file.read_into(first + n, scratch)
                    n += 1
            self.end[row, head] = n * self.layout.chunk

    def forget(self) -> None:
        """Breaks the seals of chunks on the disk beyond the ends, whose tokens others will follow."""
        for row, head in np.ndindex(*self.end.shape):
            first = (row * self.layout.n_heads + head) * self.layout.n_chunks
            for chunk in range(self.end[row, head] // self.layout.chunk, self.layout.n_chunks):
                for file in self._files:
                    file.erase(first + chunk)

    def verify(self) -> None:
        """Reads all full chunks, in 4 bits as well; `check` or this raises what is damaged."""
        self.everything()
        full = np.arange(self.layout.n_chunks) < self.end[..., None] // self.layout.chunk
        for number in np.flatnonzero(full).tolist() if self.small is not None else ():
            self._checked(self.small, number, memoryview(mmap.mmap(-1, self.small.stride)))

    def settle(self) -> None:
        """Waits until all full chunks are written, and raises what has failed.

        Raises:
            DamagedBlock: for a chunk that is not what was written.
            OSError: where the disk fails.
        """
        while self._writes:
            self._writes.popleft().exception()
        self.check()

    def check(self) -> None:
        """Raises what has failed, as `settle` does."""
        if self.failure is not None:
            raise self.failure

    def sync(self) -> None:
        """As `settle`, and all of it is on the disk for good."""
        self.settle()
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Closes the files once nothing is under way."""
        for task in (*self._writes, *self._coming.values()):
            task.exception()
        for file in self._files:
            file.close()

    @property
    def n_pool(self) -> int:
        """Chunks that the host holds at most."""
        return len(self._pool)

    @property
    def _files(self) -> list[BlockFile]:
        return [file for file in (self.file, self.small) if file is not None]

    @contextlib.contextmanager
    def _caught(self) -> Iterator[None]:
        """Keeps the first error for `check`: one that leaves a callback ends the program without its name."""
        try:
            yield
        except (OSError, DamagedBlock) as error:
            self.failure = self.failure or error

    def _seal(self, row: int, chunk: int) -> None:
        """Has a full chunk of every head of a row written, and puts it into the pool."""
        first = row * self.layout.n_heads * self.layout.n_chunks + chunk
        numbers = first + np.arange(self.layout.n_heads) * self.layout.n_chunks
        data = self.tail[row].copy()
        while len(self._writes) * self.layout.chunk_bytes > _PENDING:
            self._writes.popleft().exception()
        for number, rows in zip(numbers.tolist(), data, strict=True):
            self._unwritten[number] = rows
            self._writes.append(self._threads.submit(self._write, number, rows))
        numbers, data = numbers[: len(self._pool)], data[: len(self._pool)]
        self._pool[self._take(numbers)] = data

    def _write(self, number: int, rows: np.ndarray) -> None:
        """Writes a chunk; runs in a thread."""
        with self._caught():
            self.file.write(number, memoryview(rows.view(np.uint8).reshape(-1)))
            if self.small is not None:
                self.small.write(number, encode4(rows))
            del self._unwritten[number]

    def _take(self, numbers: np.ndarray) -> np.ndarray:
        """Gives chunks places in the pool and returns them: unused ones, or those read longest ago.

        What `_bring` asks for at this time is not touched; what threads still read, as a last resort.
        """
        for n in [n for n, task in self._coming.items() if task.done()]:
            self._finish(n)
        age = self._used.copy()
        reading = self._place[list(self._coming)]
        age[reading] = np.maximum(age[reading], self._clock - 1)
        places = np.argpartition(age, len(numbers) - 1)[: len(numbers)]
        if np.isin(places, reading).any():
            for n in list(self._coming):
                self._finish(n)
        gone = self._holds[places]
        self._place[gone[gone >= 0]] = -1
        self._holds[places], self._place[numbers] = numbers, places
        self._used[places], self._coarse[places], self._early[places] = self._clock, False, False
        return places

    def _bring(self, numbers: np.ndarray, count: np.ndarray) -> None:
        """Brings chunks into the pool: waits for what is read already, and reads the rest."""
        self._clock += 2
        place = self._place[numbers]
        fresh, held = place < 0, place[place >= 0]
        self._used[held] = self._clock  # none of them makes room for the others
        self.traffic.asked += len(numbers)
        self.traffic.expected += int(self._early[held].sum())
        self.traffic.pooled += int((~self._early[held]).sum())
        self._early[held] = False
        started = time.perf_counter()
        if fresh.any():
            self._start(numbers[fresh], count[fresh])
        for n in numbers.tolist():
            self._finish(n)
        waited = time.perf_counter() - started
        self.traffic.waited_s += waited
        self.pace.read(int(fresh.sum()) * self.layout.stride, waited)

    def _finish(self, number: int) -> None:
        """Waits for a chunk if a thread reads it; forgets it if that failed, and raises why."""
        task = self._coming.pop(number, None)
        if task is not None and (error := task.exception()) is not None:
            place, self._place[number] = self._place[number], -1
            self._holds[place], self._used[place] = -1, -1
            raise error

    def _start(self, numbers: np.ndarray, count: np.ndarray) -> None:
        """Has threads read chunks that are not in the pool, as many in 4 bits as the time asks for."""
        small = np.zeros(len(numbers), bool)
        if self.small is not None:
            share = self.pace.share(len(numbers) * self.layout.stride, len(numbers) * self.small.stride)
            small[np.argsort(count, kind="stable")[: round(share * len(numbers))]] = True
        places = self._take(numbers)
        self._coarse[places] = small
        for part in np.array_split(np.arange(len(numbers)), min(len(numbers), _TASKS)):
            task = self._threads.submit(self._load, numbers[part], places[part], small[part])
            self._coming.update(dict.fromkeys(numbers[part].tolist(), task))

    def _load(self, numbers: np.ndarray, places: np.ndarray, small: np.ndarray) -> None:
        """Reads chunks into their places; runs in a thread."""
        whole = few_bytes = 0
        scratch = memoryview(mmap.mmap(-1, self.small.stride)) if small.any() else None
        for number, place, few in zip(numbers.tolist(), places.tolist(), small.tolist(), strict=True):
            if (found := self._unwritten.get(number)) is not None:
                self._pool[place], self._coarse[place] = found, False
                continue
            if few:
                found = self._checked(self.small, number, scratch)
                self._pool[place] = decode4(found, self.layout.rows, self.layout.dtype)
                few_bytes += self.small.stride
            else:
                stride = self.layout.stride
                self._checked(self.file, number, self._memory[place * stride : (place + 1) * stride])
                whole += stride
        with self._counting:
            self.traffic.read_bytes += whole
            self.traffic.read4_bytes += few_bytes

    def _checked(self, file: BlockFile, number: int, place: memoryview) -> memoryview:
        """Reads a chunk, and says which tokens it holds where it is damaged."""
        try:
            return file.read_into(number, place)
        except DamagedBlock as error:
            raise DamagedBlock(f"{self._named(number)}: {error}") from error

    def _named(self, number: int) -> str:
        row, rest = divmod(number, self.layout.n_heads * self.layout.n_chunks)
        head, chunk = divmod(rest, self.layout.n_chunks)
        first = chunk * self.layout.chunk
        return f"tokens {first} to {first + self.layout.chunk - 1} of KV head {head}, row {row}"
