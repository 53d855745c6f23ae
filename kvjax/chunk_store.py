"""Keeps the rows of one layer on disk, and in host memory the chunks that were asked for last.

A full chunk is written behind, once, and never again, see `chunk_files`; the chunk of each head that is not
full yet, its tail, is in host memory alone. Threads read ahead what `expect` names, past the page cache
where the file system can. With a second file a share of what a step waits for is read in 4 bits: the least
that lets the disk keep up with the device.

Source: LeoAM (arXiv 2506.20187), its three tiers and dynamic compression; the formulas are ours.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kvjax.blocks import BlockFile
from kvjax.chunk_files import ChunkFiles, Layout
from kvjax.chunk_pool import ChunkPool
from kvjax.disk_pace import Pace, Traffic
from kvjax.disk_threads import Threads

__all__ = ["Store"]

_TASKS = 16  # that one call gives the threads
_PART = 1024  # chunks that are brought together where a whole layer is read


class Store:
    """One layer's chunks. It changes in place, under a lock; programs know it by a number."""

    def __init__(
        self, layout: Layout, n_pool: int, files: tuple[BlockFile, BlockFile | None],
        threads: Threads, pace: Pace, landing: np.ndarray | None = None,
        rooms: list[np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """Takes files that hold what was sealed before, or nothing.

        n_pool: chunks that the host holds at most.
        files: of chunks as they are; and in 4 bits, or None.
        landing: bytes that results are written to where they fit: one call's are gone with the next.
        rooms: memory for a whole layer that `expect_all` takes, of stores that are alike.
        """
        self.layout, self.traffic, self.pace = layout, Traffic(), pace
        self.files = ChunkFiles(layout, *files, threads.behind, self.traffic)
        self.pool = ChunkPool(layout, n_pool)
        self.end = np.zeros((layout.batch, layout.n_heads), np.int64)  # slots that are here
        self.tail = np.zeros((layout.batch, layout.n_heads, *layout.rows), layout.dtype)
        self._threads, self._lock = threads, threading.RLock()
        self._coming: dict[int, Future] = {}  # chunks that a thread reads
        self._landing, self._rooms = landing, [] if rooms is None else rooms
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
        out, chunk_size, pool = (
            self._out(len(leaf), size, *self.layout.rows[1:]),
            self.layout.chunk,
            self.pool,
        )
        with self._asked():
            first = leaf * size
            chunk, inside = first // chunk_size, first % chunk_size // size
            there = (leaf >= 0) & (first < self.end[row, head])
            full = there & (chunk < self.end[row, head] // chunk_size)
            number = np.where(full, self.layout.number(row, head, chunk), -1)
            wanted, count = np.unique(number[full], return_counts=True)
            for start in range(0, len(wanted), len(pool)):
                part = slice(start, start + len(pool))
                self._bring(wanted[part], count[part])
                here = full & (pool.place[number] >= 0)
                pool.copy(number, inside, np.flatnonzero(here), out, self._threads.waited_for)
                full &= ~here
            last = there & (number < 0)
            tails = self.tail.reshape(*self.tail.shape[:2], -1, *out.shape[1:])
            out[last] = tails[row[last], head[last], inside[last]]
            self.traffic.sent_bytes += int(there.sum()) * out[:1].nbytes
        return out

    def expect(self, row: np.ndarray, head: np.ndarray, leaf: np.ndarray, size: int) -> None:
        """Has threads read the chunks of leaves, and does not wait."""
        with self._busy():
            chunk = leaf * size // self.layout.chunk
            full = (leaf >= 0) & (chunk < self.end[row, head] // self.layout.chunk)
            number, count = np.unique(self.layout.number(row, head, chunk)[full], return_counts=True)
            new = self.pool.place[number] < 0
            number, count = number[new], count[new]
            most = len(self.pool) // 2  # what is expected drives out no more than that
            if len(number) > most:
                best = np.argsort(-count, kind="stable")[:most]
                number, count = number[best], count[best]
            if len(number):
                self._start(number, count, self._threads.behind)
                self.pool.early[self.pool.place[number]] = True

    def expect_all(self) -> None:
        """Has threads read all full chunks, for `read_past`, and does not wait."""
        with self._busy():
            shape = (self.layout.n_blocks, *self.layout.rows)
            room = self._rooms.pop() if self._rooms else np.empty(shape, self.layout.dtype)
            numbers = self.layout.full(self.end)
            tasks = self._copied(numbers, numbers, room, self._threads.behind)
            self._whole = room, tasks, len(numbers)

    def read_past(self, row: np.ndarray, head: np.ndarray, chunk: np.ndarray) -> Float[np.ndarray, "M P 2 D"]:
        """Returns whole chunks as they were given, -1 for none, and leaves the pool as it is.

        Of a head's last chunk, what it does not have yet holds anything.
        """
        out, started = self._out(len(chunk), *self.layout.rows), time.perf_counter()
        with self._asked():
            last = self.end[row, head] // self.layout.chunk
            full = (chunk >= 0) & (chunk < last)
            number, to = self.layout.number(row, head, chunk)[full], np.flatnonzero(full)
            threads = self._threads.waited_for
            room, tasks, left = self._whole or (None, self._copied(number, to, out, threads), 0)
            for task in tasks:
                task.result()
            if room is not None:
                for task in self._copied(number, to, out, threads, room):
                    task.result()
                left -= len(number)
                self._whole = (room, [], left) if left > 0 else None
                self._rooms.extend([room] * (left <= 0))
            tail = (chunk >= 0) & (chunk == last)
            out[tail] = self.tail[row[tail], head[tail]]
            self.traffic.sent_bytes += int((full | tail).sum()) * self.layout.chunk_bytes
        self.traffic.waited_s += time.perf_counter() - started
        return out

    def everything(self) -> Float[np.ndarray, "B K S 2 D"]:
        """Returns all rows as they were given; those from a head's end on hold anything."""
        shape = (self.layout.batch, self.layout.n_heads, self.layout.n_chunks)
        at = [x.reshape(-1) for x in np.indices(shape)]
        parts = (slice(i, i + _PART) for i in range(0, len(at[0]), _PART))
        rows = np.concatenate([self.read_past(*(x[part] for x in at)).copy() for part in parts])
        return rows.reshape(*shape[:2], -1, *self.layout.rows[1:])[:, :, : self.layout.slots]

    def find(self) -> None:
        """Takes what is on the disk: of each head, the chunks before the first that is not whole."""
        self.end[:] = self.files.ends()

    def forget(self) -> None:
        """Gives up chunks on the disk beyond the ends, whose tokens others will follow."""
        self.files.forget(self.end)

    def verify(self) -> None:
        """Reads all full chunks, in 4 bits as well; `check` or this raises what is damaged."""
        self.everything()
        room = self.files.room()
        for number in self.layout.full(self.end).tolist() if self.files.small is not None else ():
            self.files.read4(number, room)

    def check(self) -> None:
        """Raises what has failed, see `ChunkFiles.check`."""
        self.files.check()

    def sync(self) -> None:
        """Waits until all full chunks are on the disk for good, and raises what has failed."""
        self.files.sync()

    def close(self) -> None:
        """Closes the files once nothing is under way."""
        for task in self._coming.values():
            task.exception()
        self.files.close()

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """Takes the store for a call, and keeps count of its time and of what fails."""
        started = time.perf_counter()
        with self._lock, self.files.caught():
            yield
        self.traffic.busy_s += time.perf_counter() - started

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """As `_busy`, of a call that a program waits for."""
        entered = time.perf_counter()
        with self._busy():
            self.pace.entered(entered)
            yield
        self.pace.left(time.perf_counter())

    def _out(self, *shape: int) -> np.ndarray:
        """Returns room for a result."""
        n_bytes = int(np.prod(shape)) * np.dtype(self.layout.dtype).itemsize
        if self._landing is None or n_bytes > self._landing.size:
            return np.zeros(shape, self.layout.dtype)
        return self._landing[:n_bytes].view(self.layout.dtype).reshape(shape)

    def _seal(self, row: int, chunk: int) -> None:
        """Has a full chunk of every head of a row written, and puts it into the pool."""
        numbers, data = self.layout.number(row, np.arange(self.layout.n_heads), chunk), self.tail[row].copy()
        self.files.write(numbers, data)
        numbers, data = numbers[: len(self.pool)], data[: len(self.pool)]
        self.pool.rows[self._take(numbers)] = data

    def _take(self, numbers: np.ndarray) -> np.ndarray:
        """Gives chunks places in the pool and returns them.

        What `_bring` asks for at this time is not touched; what threads still read, as a last resort.
        """
        done = {task for task in set(self._coming.values()) if task.done()}
        self._finish([n for n, task in self._coming.items() if task in done])
        places = self.pool.oldest(len(numbers), list(self._coming))
        if np.isin(places, self.pool.place[list(self._coming)]).any():
            self._finish(list(self._coming))
        self.pool.give(places, numbers)
        return places

    def _bring(self, numbers: np.ndarray, count: np.ndarray) -> None:
        """Brings chunks into the pool: waits for what is read already, and reads the rest."""
        fresh, held = self.pool.call(numbers)
        early = int(self.pool.early[held].sum())
        self.traffic.asked += len(numbers)
        self.traffic.expected += early
        self.traffic.pooled += len(held) - early
        self.pool.early[held] = False
        started = time.perf_counter()
        if fresh.any():
            self._start(numbers[fresh], count[fresh], self._threads.waited_for)
        self._finish(numbers.tolist())
        waited = time.perf_counter() - started
        self.traffic.waited_s += waited
        self.pace.read(int(fresh.sum()) * self.layout.stride, waited)

    def _finish(self, numbers: list[int]) -> None:
        """Waits for those chunks that threads read; forgets them if that failed, and raises why."""
        under_way = {n: self._coming.pop(n) for n in numbers if n in self._coming}
        failed = {task: error for task in set(under_way.values()) if (error := task.exception()) is not None}
        for n, task in under_way.items():
            if task in failed:
                self.pool.drop(n)
        for error in failed.values():
            raise error

    def _start(self, numbers: np.ndarray, count: np.ndarray, threads: ThreadPoolExecutor) -> None:
        """Has threads read chunks that are not in the pool, as many in 4 bits as the time asks for."""
        small = np.zeros(len(numbers), bool)
        if (file := self.files.small) is not None:
            share = self.pace.share(len(numbers) * self.layout.stride, len(numbers) * file.stride)
            small[np.argsort(count, kind="stable")[: round(share * len(numbers))]] = True
        places = self._take(numbers)
        self.pool.coarse[places] = small
        for part in np.array_split(np.arange(len(numbers)), min(len(numbers), _TASKS)):
            task = threads.submit(self._load, numbers[part], places[part], small[part])
            self._coming.update(dict.fromkeys(numbers[part].tolist(), task))

    def _load(self, numbers: np.ndarray, places: np.ndarray, small: np.ndarray) -> None:
        """Reads chunks into their places; runs in a thread."""
        room, whole = self.files.room() if small.any() else None, {}
        for number, place, few in zip(numbers.tolist(), places.tolist(), small.tolist(), strict=True):
            if (found := self.files.waiting(number)) is not None:
                self.pool.rows[place], self.pool.coarse[place] = found, False
            elif few:
                self.pool.rows[place] = self.files.read4(number, room)
            else:
                whole[number] = self.pool.memory(place)
        self.files.read_into(list(whole), list(whole.values()))

    def _copied(
        self, numbers: np.ndarray, to: np.ndarray, out: np.ndarray, threads: ThreadPoolExecutor,
        room: np.ndarray | None = None,
    ) -> list[Future]:  # fmt: skip
        """Has threads copy chunks to out[to] from the pool and the disk, or from a room for all of them."""
        self._finish(list(self._coming))
        if room is None:
            place = self.pool.place[numbers]
            place, room = np.where(self.pool.coarse[place], -1, place), self.pool.rows
        else:
            place = numbers
        parts = np.array_split(np.arange(len(numbers)), _TASKS)
        tasks = ((numbers[i], place[i], to[i]) for i in parts if len(i))
        return [threads.submit(self._copy, *task, room, out) for task in tasks]

    def _copy(
        self, numbers: np.ndarray, places: np.ndarray, to: np.ndarray, room: np.ndarray, out: np.ndarray
    ) -> None:
        """Copies chunks from their places in host memory, or reads them past it; runs in a thread."""
        here = places >= 0
        out[to[here]] = room[places[here]]
        self.files.copy(numbers[~here].tolist(), to[~here], out)
