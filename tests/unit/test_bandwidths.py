import dataclasses
import errno
import math
import os
from types import SimpleNamespace

import pytest

from kvjax import bandwidths
from kvjax.bandwidths import Bandwidths, measure

TOY = {"device_bytes": 2**14, "disk_bytes": 2**16, "block_bytes": 4096, "workers": 3}
RATES = [field.name for field in dataclasses.fields(Bandwidths) if field.name != "direct"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bandwidths.timing, "_SPAN_S", 0.001)


def rates(found):
    return [getattr(found, name) for name in RATES]


def refuse_direct(monkeypatch):
    """Has the disk open no file past the page cache."""
    real = os.open

    def opened(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", opened)


def test_rates_are_positive_and_the_file_is_gone(tmp_path):
    found = measure(tmp_path, **TOY)
    assert all(isinstance(rate, float) and math.isfinite(rate) and rate > 0 for rate in rates(found))
    assert not list(tmp_path.iterdir())
    assert hash(found) == hash(dataclasses.replace(found))


def test_no_folder_measures_no_disk():
    found = measure(None, **TOY)
    assert found.device_copy > 0
    assert (found.disk_read, found.disk_write, found.direct) == (None, None, False)


def test_a_backend_without_pinned_memory_moves_numpys(monkeypatch):
    monkeypatch.setattr(bandwidths, "memory_kinds", lambda: ("device",))
    found = measure(None, **TOY)
    assert all(math.isfinite(rate) and rate > 0 for rate in (found.to_device, found.from_device))


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT to refuse")
@pytest.mark.parametrize("when", ["opened", "read", "in memory"])
def test_a_disk_without_direct_reads_is_read_and_told(tmp_path, monkeypatch, when):
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[3]))
    if when == "opened":
        refuse_direct(monkeypatch)
    elif when == "read":
        monkeypatch.setattr(bandwidths, "_reads", lambda *_: False)
    else:
        monkeypatch.setattr(bandwidths, "_in_memory", lambda _: True)
    found = measure(tmp_path, **TOY)
    assert not found.direct
    assert found.disk_read > 0
    assert os.POSIX_FADV_DONTNEED in dropped
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")
def test_direct_reads_bring_each_block_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidths, "_in_memory", lambda _: False)  # where the folder may lie
    monkeypatch.setattr(bandwidths, "_reads", lambda *_: True)
    real, seen = os.preadv, []

    def read(handle, buffers, at):
        seen.append(at)
        return real(handle, buffers, at)

    monkeypatch.setattr(os, "preadv", read)
    measure(tmp_path, **TOY)
    assert sorted(seen) == list(range(0, 2**16, 4096))
    assert seen != sorted(seen)


def test_a_folder_that_takes_no_file_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, tmp_path / "none"):
        with pytest.raises(OSError, match=r"takes a file of 65,536 bytes, got '.*' \(.*take another folder"):
            measure(folder, **TOY)
    disk = SimpleNamespace(free=5)
    with monkeypatch.context() as full:
        full.setattr(bandwidths.shutil, "disk_usage", lambda _: disk)
        with pytest.raises(OSError, match=r"\(5 bytes are free\): take another folder, or fewer bytes"):
            measure(tmp_path, **TOY)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"Read-only file system.*take another folder"):
        measure(tmp_path, **TOY)


@pytest.mark.parametrize("name", ["pwrite", "fsync", "preadv"])
def test_a_disk_that_fails_on_the_way_leaves_no_file(tmp_path, monkeypatch, name):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(OSError, match=r"No space left on device.*take another folder"):
        measure(tmp_path, **TOY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pwrite", "preadv"])
def test_half_a_block_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, name, lambda *_: 2048)
    with pytest.raises(OSError, match="2048 of a block's 4096 bytes were moved"):
        measure(tmp_path, **TOY)


def test_other_bytes_than_written_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: len(buffers[0]))
    with pytest.raises(OSError, match="what was read is not what was written"):
        measure(tmp_path, **TOY)


def test_an_interrupted_run_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, **TOY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"device_bytes": 3}, "at least 4 bytes, got device_bytes=3"),
        ({"block_bytes": 5000}, "a block is a multiple of 4096 bytes, got block_bytes=5000: take 36864"),
        ({"block_bytes": 0}, "got block_bytes=0"),
        ({"workers": 0}, "at least one thread reads, got workers=0"),
        ({"disk_bytes": 24575}, "a file is at least 24576 bytes for block_bytes=4096, got disk_bytes=24575"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        measure(tmp_path, **(TOY | sizes))
