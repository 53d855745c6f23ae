"""Measures how fast bytes move here: within the device, between it and the host, and to and from a disk.

The disk's part is a file of random bytes without a name, so it goes with the process, whatever ends that.
Each byte is written once and read once, in parts that are timed one by one; the first of them is no more
than a warm-up. A virtual disk may still hold in its host's memory what was just written.
"""

import contextlib
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.blocks import ALIGN
from pallas_kernels import timing

__all__ = ["BLOCK_BYTES", "WORKERS", "Bandwidths", "measure", "memory_kinds"]

BLOCK_BYTES = 9 * ALIGN  # of a read: what 32 KiB and their seal take in a file of `blocks`
WORKERS = 8  # threads that read
_REPEATS = 5  # whose median counts
_SETS = 2  # arrays that cross in one program
_PAYLOAD_BYTES = 2**24  # random ones, that the file repeats: a disk that compresses sees further back at most


@dataclass(frozen=True)
class Bandwidths:
    """Rates in bytes per second; None was not measured.

    Args:
        device_copy: of a copy within the device's memory, bytes read plus bytes written.
        to_device: from pinned host memory where the backend has it, else from NumPy's.
        from_device: to pinned host memory where the backend has it, else to NumPy's.
        disk_read: blocks in random order, by several threads.
        disk_write: in order, until they are on the disk.
        direct: whether the disk was read past the page cache; if not, memory may have served.
    """

    device_copy: float | None = None
    to_device: float | None = None
    from_device: float | None = None
    disk_read: float | None = None
    disk_write: float | None = None
    direct: bool = False


def measure(
    folder: Path | str | None,
    *,
    device_bytes: int = 2**28,
    disk_bytes: int = 2**28,
    block_bytes: int = BLOCK_BYTES,
    workers: int = WORKERS,
) -> Bandwidths:
    """Measures the default device and the disk of a folder; medians of repeats after a warm-up.

    Args:
        folder: where a file is written, which is gone afterwards; None measures no disk.
        device_bytes: of an array that is moved.
        disk_bytes: of the file.
        block_bytes: of a read, a multiple of 4,096.
        workers: threads that read.

    Raises:
        ValueError: for sizes that cannot be measured.
        OSError: for a folder that is full, read-only or none.

    **Cost**: disk_bytes written and read; some four arrays of device_bytes on the device, and on the host.

    Example:
        >>> import tempfile
        >>> found = measure(tempfile.gettempdir(), device_bytes=2**16, disk_bytes=2**20)
        >>> found.device_copy > 0 and found.disk_read > 0
        True
    """
    if device_bytes < 4:
        raise ValueError(f"an array has at least 4 bytes, got {device_bytes=}")
    if block_bytes < ALIGN or block_bytes % ALIGN:
        raise ValueError(f"a block is a multiple of {ALIGN} bytes, got {block_bytes=}: take {BLOCK_BYTES}")
    if workers < 1:
        raise ValueError(f"at least one thread reads, got {workers=}")
    if folder is not None and disk_bytes < (least := (_REPEATS + 1) * block_bytes):
        raise ValueError(f"a file is at least {least} bytes for {block_bytes=}, got {disk_bytes=}: take more")
    disk = (None, None, False) if folder is None else _disk(folder, disk_bytes, block_bytes, workers)
    size = device_bytes // 4 * 4
    return Bandwidths(timing.copy_rate(size), *_across(size), *disk)


def memory_kinds() -> tuple[str, ...]:
    """Returns the kinds of memory that the default device reaches, its own first.

    Example:
        >>> memory_kinds()[0]
        'device'
    """
    device = _device()
    own = device.default_memory().kind
    return own, *sorted({memory.kind for memory in device.addressable_memories()} - {own})


def _device() -> jax.Device:
    """Returns the device that arrays come to."""
    (device,) = jnp.zeros(()).devices()
    return device


def _across(size: int) -> tuple[float, float]:
    """Returns the rates to the device and from it."""
    near = [jnp.arange(size // 4, dtype=jnp.float32) + i for i in range(_SETS)]
    if "pinned_host" not in memory_kinds():
        return _across_numpy(near)
    far = [jax.device_put(x, jax.memory.Space.Host) for x in near]
    to_us = timing.time_us(lambda x: jax.device_put(x, jax.memory.Space.Device), far, _REPEATS)
    from_us = timing.time_us(lambda x: jax.device_put(x, jax.memory.Space.Host), near, _REPEATS)
    return size / (to_us * 1e-6), size / (from_us * 1e-6)


def _across_numpy(near: Sequence[jax.Array]) -> tuple[float, float]:
    """Returns the rates from NumPy's memory to the device and back."""
    device, far = _device(), [np.array(x) for x in near]
    there = lambda arrays: [jax.device_put(x, device, may_alias=False) for x in arrays]  # noqa: E731
    to_us, _ = timing.race({"": (there, far)}, _REPEATS)[""]
    copy = np.array if device.platform == "cpu" else np.asarray  # which only looks at a CPU's arrays
    spans = []
    for i in range(_REPEATS + 1):
        new = jax.block_until_ready([x + i for x in near])  # an array remembers its copy
        start = time.perf_counter()
        for x in new:
            copy(x)
        spans.append((time.perf_counter() - start) / len(new))
    return near[0].nbytes / (to_us * 1e-6), near[0].nbytes / statistics.median(spans[1:])


def _disk(folder: Path | str, disk_bytes: int, block_bytes: int, workers: int) -> tuple[float, float, bool]:
    """Returns the rates of reading and writing, and whether reads went past the page cache.

    Raises:
        OSError: for a folder that takes no such file.
    """
    n_blocks, rng = disk_bytes // block_bytes, np.random.default_rng(0)
    payload = rng.bytes(min(n_blocks, max(1, _PAYLOAD_BYTES // block_bytes)) * block_bytes)
    try:
        if (free := shutil.disk_usage(folder).free) < disk_bytes:
            raise OSError(f"{free:,} bytes are free")
        with _nameless(folder) as (handle, direct), ThreadPoolExecutor(workers) as pool:
            written = [_write(handle, part, payload, block_bytes) for part in _parts(np.arange(n_blocks))]
            buffers = [mmap.mmap(-1, block_bytes) for _ in range(workers)]  # whole pages, as O_DIRECT wants
            if direct is None or _in_memory(handle) or not _reads(direct, buffers[0]):
                direct = None
                _forget(handle)
            source = handle if direct is None else direct
            order = rng.permutation(n_blocks)
            read = [_read(source, part, payload, buffers, pool) for part in _parts(order)]
    except OSError as error:
        raise OSError(
            f"a folder to measure takes a file of {disk_bytes:,} bytes, got {str(folder)!r} ({error}): "
            "take another folder, or fewer bytes"
        ) from error
    return statistics.median(read[1:]), statistics.median(written[1:]), direct is not None


@contextlib.contextmanager
def _nameless(folder: Path | str) -> Iterator[tuple[int, int | None]]:
    """Yields two handles of a new file that has no name: one, and one past the page cache or None."""
    handle, path = tempfile.mkstemp(dir=folder, prefix=".kvjax-")
    direct = None
    try:
        try:
            with contextlib.suppress(AttributeError, OSError):  # no such flag here, or not on this disk
                direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        finally:
            os.unlink(path)
        yield handle, direct
    finally:
        os.close(handle)
        if direct is not None:
            os.close(direct)


def _parts(blocks: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(blocks, _REPEATS + 1)]


def _write(handle: int, part: Sequence[int], payload: bytes, block_bytes: int) -> float:
    """Writes blocks and waits until they are on the disk; returns the rate."""
    views = [_of(payload, i, block_bytes) for i in part]
    start = time.perf_counter()
    for i, view in zip(part, views, strict=True):
        _whole(os.pwrite(handle, view, i * block_bytes), block_bytes)
    os.fsync(handle)
    return len(part) * block_bytes / (time.perf_counter() - start)


def _read(
    handle: int, part: Sequence[int], payload: bytes, buffers: Sequence[mmap.mmap], pool: ThreadPoolExecutor
) -> float:
    """Reads blocks, a thread to each buffer; returns the rate."""
    size = len(buffers[0])

    def read(buffer: mmap.mmap, blocks: Sequence[int]) -> None:
        for i in blocks:
            _whole(os.preadv(handle, [buffer], i * size), size)

    shares = [part[i :: len(buffers)] for i in range(len(buffers))]
    start = time.perf_counter()
    list(pool.map(read, buffers, shares))
    took = time.perf_counter() - start
    for buffer, blocks in zip(buffers, shares, strict=True):
        if blocks and buffer[:] != _of(payload, blocks[-1], size):
            raise OSError("what was read is not what was written")
    return len(part) * size / took


def _reads(direct: int, buffer: mmap.mmap) -> bool:
    """Says whether a disk that was opened past the page cache is read so: some refuse only now."""
    try:
        return os.preadv(direct, [buffer], 0) == len(buffer)
    except OSError:
        return False


def _in_memory(handle: int) -> bool:
    """Says whether a file is in a file system in memory: newer ones take O_DIRECT and have no disk."""
    number = os.fstat(handle).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return False
    kinds = [line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == device]
    return any(kind in ("tmpfs", "ramfs") for kind in kinds)


def _forget(handle: int) -> None:
    """Asks the system to drop a file from its cache, and not to read ahead, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _of(payload: bytes, block: int, size: int) -> memoryview:
    """Returns the bytes of a block."""
    at = block * size % len(payload)
    return memoryview(payload)[at : at + size]


def _whole(n_bytes: int, block_bytes: int) -> None:
    if n_bytes != block_bytes:
        raise OSError(f"{n_bytes} of a block's {block_bytes} bytes were moved")
