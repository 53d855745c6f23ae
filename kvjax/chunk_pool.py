"""Keeps chunks in host memory by their numbers; those that were asked for longest ago make room."""

import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Int

from kvjax.chunk_files import Layout

__all__ = ["ChunkPool"]

_ALONE = 2**20  # bytes that are worth a thread
_PARTS = 16  # that one call gives the threads


class ChunkPool:
    """Places for chunks, and which chunk each has.

    Time goes by calls, see `call`: what one call has asked for makes no room within it.
    """

    def __init__(self, layout: Layout, n: int) -> None:
        """Makes n free places."""
        memory = mmap.mmap(-1, n * layout.stride)  # begins on a page, as direct reads want
        self._memory, self._stride = memoryview(memory), layout.stride
        rows = np.frombuffer(memory, np.uint8).reshape(n, layout.stride)[:, : layout.chunk_bytes]
        self.rows = rows.view(layout.dtype).reshape(n, *layout.rows)
        self.place = np.full(layout.n_blocks, -1, np.int64)  # of each chunk, -1 = not here
        self.coarse = np.zeros(n, bool)  # came in 4 bits
        self.early = np.zeros(n, bool)  # came before it was asked for
        self._holds = np.full(n, -1, np.int64)  # the chunk at each place
        self._used = np.full(n, -1, np.int64)  # the time, -1 is free
        self._now = 0

    def __len__(self) -> int:
        return len(self.rows)

    def memory(self, place: int) -> memoryview:
        """Returns the bytes of a place, a stride of them."""
        return self._memory[place * self._stride : (place + 1) * self._stride]

    def call(self, numbers: Int[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
        """Notes that chunks are asked for now; returns which are not here, and the places of the others."""
        self._now += 2
        place = self.place[numbers]
        held = place[place >= 0]
        self._used[held] = self._now
        return place < 0, held

    def oldest(self, n: int, coming: list[int]) -> Int[np.ndarray, " N"]:
        """Returns places: free ones, or those asked for longest ago; of chunks that are coming, the last."""
        age = self._used.copy()
        reading = self.place[coming]
        age[reading] = np.maximum(age[reading], self._now - 1)
        return np.argpartition(age, n - 1)[:n]

    def give(self, places: Int[np.ndarray, " N"], numbers: Int[np.ndarray, " N"]) -> None:
        """Gives places to other chunks."""
        gone = self._holds[places]
        self.place[gone[gone >= 0]] = -1
        self._holds[places], self.place[numbers] = numbers, places
        self._used[places], self.coarse[places], self.early[places] = self._now, False, False

    def copy(
        self, numbers: Int[np.ndarray, " M"], inside: Int[np.ndarray, " M"], to: Int[np.ndarray, " N"],
        out: Float[np.ndarray, "M P 2 D"], threads: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        """Copies leaves of P slots to out[to], by threads where that is worth it.

        numbers: of each leaf's chunk. inside: the leaf's number in it.
        """
        leaves = self.rows.reshape(len(self), -1, *out.shape[1:])

        def some(part: Int[np.ndarray, " I"]) -> None:
            out[part] = leaves[self.place[numbers[part]], inside[part]]

        n = len(to) * out[:1].nbytes // _ALONE
        if n < 2:
            some(to)
        else:
            list(threads.map(some, np.array_split(to, min(n, _PARTS))))

    def drop(self, number: int) -> None:
        """Frees the place of a chunk."""
        place, self.place[number] = self.place[number], -1
        self._holds[place], self._used[place] = -1, -1
