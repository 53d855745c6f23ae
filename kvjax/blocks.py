"""Holds bytes in a file of blocks of one size, each with a checksum, that a crash does not mix up.

    block i     at stride·(i + 1): payload, zeros, seal                 stride: a multiple of 4,096 bytes
    seal        its last 40 bytes: a mark, the generation, i, the payload's length, and xxh3 of all before
    block -1    at 0: the same; its payload is the sizes

A block is sealed by the write that brings its payload, so what was not finished has no valid seal. A block of
another place, or of an earlier generation of the file, has another seal and counts as damaged here.
"""

import errno
import functools
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

__all__ = ["ALIGN", "BlockFile", "DamagedBlock", "create", "open_blocks", "stride_of"]

ALIGN = 4096  # of blocks, as direct input and output wants it
_SEAL = struct.Struct("<8sqqI4xQ")  # mark, generation, number, length; then xxh3 of all before
_SUM_BYTES = 8
_MARK = b"kvjaxB1\n"
_HEAD = struct.Struct("<qq")  # bytes of a payload at most, generation


class DamagedBlock(ValueError):
    """A block that is not what was written: where it is, and what is wrong with it.

    number: of the block, where there is one.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        """Takes what it says."""
        super().__init__(message)
        self.number = number


@dataclass(frozen=True, eq=False)
class BlockFile:
    """An open file of blocks; made by `create` and `open_blocks`.

    Args:
        path: of the file.
        handle: the open file's number.
        block_bytes: of a payload, at most.
        generation: that all of its blocks belong to.
        reader: the handle that blocks are read by.
        direct: whether that reads the disk itself; not every file system does, then pages are cached.
    """

    path: Path
    handle: int
    block_bytes: int
    generation: int
    reader: int  # the handle that blocks are read by, past the page cache where `direct`
    direct: bool

    def __enter__(self) -> "BlockFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @functools.cached_property
    def stride(self) -> int:
        """The bytes of a block in the file."""
        return stride_of(self.block_bytes)

    def close(self) -> None:
        """Closes the file."""
        for handle in {self.handle, self.reader}:
            os.close(handle)

    def write(self, number: int, payload: bytes | memoryview) -> None:
        """Writes and seals a block; it is on disk for good after `sync`.

        Raises:
            ValueError: for a payload that is longer than blocks are.
            OSError: where the disk refuses.
        """
        if len(payload) > self.block_bytes:
            raise ValueError(f"a block has up to {self.block_bytes} bytes, got {len(payload)}")
        raw = _sealed(payload, number, self.generation, self.stride)
        try:
            _put(self.handle, number, raw)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def erase(self, number: int) -> None:
        """Breaks the seal of a block, if there is one."""
        place = (number + 2) * self.stride - ALIGN
        if any(os.pread(self.handle, ALIGN, place)):
            os.pwrite(self.handle, bytes(ALIGN), place)

    def sync(self) -> None:
        """Waits until all that was written is on the disk."""
        os.fsync(self.handle)

    def read(self, number: int) -> memoryview:
        """Returns a block's payload.

        Raises:
            DamagedBlock: where it is cut short, was never finished, or is not what was written.
        """
        return self.read_into(number, memoryview(mmap.mmap(-1, self.stride)))

    def read_into(self, number: int, place: memoryview) -> memoryview:
        """Returns a block's payload, which is a part of `place`: a stride of bytes that begins on a page.

        Raises:
            DamagedBlock: as `read`.
            OSError: where the disk fails.
        """
        return self.read_run(number, 1, place)[0]

    def read_run(self, number: int, n: int, place: memoryview) -> list[memoryview]:
        """Reads n neighbouring blocks at once and returns their payloads; raises as `read_into`."""
        stride = self.stride
        done, size, start = 0, n * stride, (number + 1) * stride
        while done < size and (some := os.preadv(self.reader, [place[done:size]], start + done)):
            done += some
            if done % ALIGN:  # cut short: no read past the cache begins within a page
                break
        ends = (min(done, (i + 1) * stride) for i in range(n))
        parts = [place[i * stride : end] for i, end in enumerate(ends)]
        return [_opened(raw, number + i, self.generation, stride, self.path) for i, raw in enumerate(parts)]


def create(path: Path, block_bytes: int, generation: int) -> BlockFile:
    """Makes a new file, which must not be there.

    Raises:
        ValueError: for blocks of no bytes.
        OSError: where the disk refuses.
    """
    if block_bytes < 1:
        raise ValueError(f"a block has at least 1 byte, got {block_bytes=}")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    file = BlockFile(path, handle, block_bytes, generation, *_reader(path, handle))
    try:
        head = _sealed(_HEAD.pack(block_bytes, generation), -1, generation, ALIGN)
        _put(file.handle, -1, head.ljust(stride_of(block_bytes), b"\0"))
    except BaseException:
        file.close()
        raise
    return file


def open_blocks(path: Path, *, writable: bool = False) -> BlockFile:
    """Opens a file to read, or to write more blocks as well.

    Raises:
        FileNotFoundError: where there is none.
        DamagedBlock: where its first block is not whole.
    """
    handle = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        raw = os.pread(handle, ALIGN, 0)
        generation = _SEAL.unpack_from(raw, ALIGN - _SEAL.size)[1] if len(raw) == ALIGN else 0
        sizes = _opened(raw, -1, generation, ALIGN, path)
        block_bytes, generation = _HEAD.unpack(sizes)
    except BaseException:
        os.close(handle)
        raise
    return BlockFile(path, handle, block_bytes, generation, *_reader(path, handle))


def _reader(path: Path, handle: int) -> tuple[int, bool]:
    """Returns a handle that reads past the page cache, if the file system has such, and whether it does."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return handle, False


def stride_of(block_bytes: int) -> int:
    """Returns the bytes that a block takes in its file."""
    return -(-(block_bytes + _SEAL.size) // ALIGN) * ALIGN


def _sealed(payload: bytes | memoryview, number: int, generation: int, stride: int) -> bytes:
    seal = _SEAL.pack(_MARK, generation, number, len(payload), 0)[:-_SUM_BYTES]
    body = bytes(payload).ljust(stride - _SEAL.size, b"\0") + seal
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(_SUM_BYTES, "little")


def _opened(raw: bytes | memoryview, number: int, generation: int, stride: int, path: Path) -> memoryview:
    if len(raw) != stride:
        wrong = f"has {stride} bytes on disk, got {len(raw)} of {{}}: it is cut short"
    else:
        mark, found, place, length, digest = _SEAL.unpack_from(raw, stride - _SEAL.size)
        if digest != xxhash.xxh3_64_intdigest(raw[:-_SUM_BYTES]):
            wrong = "has the checksum of its bytes, got another in {}: it is damaged"
        elif (mark, found, place) != (_MARK, generation, number) or length > stride - _SEAL.size:
            wrong = f"has its own place and generation, got {place} of {found} in {{}} of {generation}"
        else:
            return memoryview(raw)[:length]
    raise DamagedBlock("a block " + wrong.format(f"block {number} of {str(path)!r}"), number)


def _put(handle: int, number: int, raw: bytes) -> None:
    """Writes a whole block; a disk that takes a part of it is asked again for the rest."""
    done = 0
    while done < len(raw):
        done += os.pwrite(handle, memoryview(raw)[done:], (number + 1) * len(raw) + done)
