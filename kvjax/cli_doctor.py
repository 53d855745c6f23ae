"""The command `kvjax doctor`: what JAX runs on here, which kernels it takes, and how fast bytes move."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from kvjax import bandwidths
from pallas_kernels import dispatch
from pallas_kernels.registry import ops

__all__ = ["Doctor"]

_WIDTH = 140  # where no terminal says
_LANGUAGES = {"gpu": "Pallas Triton", "tpu": "Pallas Mosaic", "reference": "XLA"}


@dataclass(frozen=True)
class Doctor:
    """Tells what JAX runs on here, and how fast bytes move.

    Args:
        disk: a folder whose disk is measured too, by a file that is gone afterwards.
        bytes: of that file, and of the arrays that are moved.
    """

    disk: Path | None = None
    bytes: int = 2**28

    def run(self) -> None:
        """Measures, and writes a table."""
        found = bandwidths.measure(self.disk, device_bytes=self.bytes, disk_bytes=self.bytes)
        console = Console(highlight=False, markup=False, emoji=False)
        console.width = console.width if console.is_terminal else max(console.width, _WIDTH)
        table = Table(show_header=False, box=None, pad_edge=False)
        for row in (*_machine(), *self._rates(found)):
            table.add_row(*row)
        console.print(table)

    def _rates(self, found: bandwidths.Bandwidths) -> Iterator[tuple[str, str, str]]:
        host = "pinned host memory" if "pinned_host" in bandwidths.memory_kinds() else "NumPy's memory"
        yield "device copy", _rate(found.device_copy), "read plus write of device memory"
        yield "to device", _rate(found.to_device), f"from {host}"
        yield "from device", _rate(found.from_device), f"to {host}"
        if self.disk is None:
            yield "disk", "not measured", "name a folder with --disk"
            return
        yield "disk write", _rate(found.disk_write), f"in order, with fsync, in {self.disk}"
        block, n = bandwidths.BLOCK_BYTES // 1024, bandwidths.WORKERS
        yield "disk read", _rate(found.disk_read), f"blocks of {block} KiB in random order, {n} threads"
        if found.direct:
            yield "page cache", "passed by", "the disk itself was read"
        else:
            yield (
                "page cache",
                "not passed by",
                "no O_DIRECT here, or no disk (tmpfs): memory may have served",
            )


def _machine() -> Iterator[tuple[str, str, str]]:
    devices = jax.devices()
    yield "JAX", jax.__version__, ""
    yield "backend", jax.default_backend(), f"{len(devices)} device{'s' if len(devices) > 1 else ''}"
    yield "device", devices[0].device_kind, ""
    own, *others = bandwidths.memory_kinds()
    yield "memory", own, f"and {', '.join(others)}" if others else ""
    yield "kernels", *_kernels()


def _kernels() -> tuple[str, str]:
    """Returns the back end that ops take here, and which ops take the reference nevertheless."""
    with dispatch.watch() as taken:  # asks who decides; nothing runs
        dispatch.run("kernels", None, dict.fromkeys(_LANGUAGES, lambda: None))
    name = taken["kernels"]
    if name == "reference":
        return f"{name} ({_LANGUAGES[name]})", f"all {len(ops())} ops: no kernels for this device"
    without = [op.name for op in ops().values() if name not in op.platforms]
    rest = f"; {', '.join(without)} by the reference" if without else ""
    return f"{name} ({_LANGUAGES[name]})", f"{len(ops()) - len(without)} of {len(ops())} ops{rest}"


def _rate(rate: float | None) -> str:
    return "not measured" if rate is None else f"{rate / 1e9:.3g} GB/s"
