"""Finds out what a figure depends on beside its settings: device, command, commit, versions and source."""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["ROOT", "command", "commit", "device", "slug", "versions"]

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "kvjax")
SOURCES = ("kvjax", "pallas_kernels", "experiments")


def slug(device: str) -> str:
    """Returns the short name of a device for a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device() -> tuple[str, str]:
    """Returns what JAX computes on, in words, and its short name for a file."""
    import jax  # here, so that reading results does not start JAX

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{os.cpu_count()}-core CPU ({_cpu_name()})", "cpu"
    name = devices[0].device_kind + (f" x{len(devices)}" if len(devices) > 1 else "")
    return name, slug(name)


def _cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def command() -> str:
    """Returns the command line of this process as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    return " ".join(["python", program, *map(shlex.quote, sys.argv[1:])])


def commit() -> str:
    """Returns the commit of the source, with `-dirty` where anything but results differs from it.

    KVJAX_COMMIT names it where a copy of the source runs, without its history.
    """
    if named := os.environ.get("KVJAX_COMMIT"):
        return named
    git = ["git", "-C", str(ROOT)]
    try:
        run = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = [*git, "status", "--porcelain", "--", ".", ":!experiments/results"]
        dirty = subprocess.run(changes, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip() + ("-dirty" if dirty else "")


def versions() -> dict[str, str]:
    """Returns the versions that figures depend on; `source` is a digest of our own files."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"source": _source_digest()}


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(p for top in SOURCES for p in (ROOT / top).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
