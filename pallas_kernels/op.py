"""What every kernel op declares, and tests, benchmarks and the tuner read: one list of shapes.

A `Spec` is one case of an op: it makes its inputs and knows its cost. Specs with "test" among
their uses are small and are interpreted, compared with the reference and compiled for every
device; "bench" are timed on hardware and compiled too; "tune" are what the tuner searches on.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from pallas_kernels import tolerance

__all__ = ["Op", "Spec"]


class Spec(abc.ABC):
    """One case of an op; subclasses are frozen dataclasses of its sizes."""

    uses: tuple[str, ...]  # of "test", "bench", "tune"
    platforms: tuple[str, ...] = ("gpu", "tpu")  # that the case is for

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A short name, unique in the op."""

    @abc.abstractmethod
    def arrays(self, key: jax.Array) -> dict[str, Any]:
        """Makes random inputs, by parameter name; what the op must not read is NaN. Traceable."""

    @abc.abstractmethod
    def options(self) -> dict[str, Any]:
        """Returns the other arguments: static ones."""

    @abc.abstractmethod
    def bytes(self) -> int:
        """Returns the fewest bytes of memory traffic: each input needed read once, outputs written once."""

    @abc.abstractmethod
    def limit(self) -> float:
        """Returns the largest error against the reference that passes."""


@dataclass(frozen=True)
class Op:
    """An op of the library.

    swaps: pairs of inputs that a test exchanges, and must then see fail.
    error: distance of outputs from the reference's, given also inputs and options by parameter name.
    candidates: the settings that the tuner tries for a spec, one per implementation name.
    platforms: those that have a kernel; on others the reference runs.
    """

    call: Callable[..., Any]
    specs: Sequence[Spec]
    swaps: tuple[tuple[str, str], ...] = ()
    error: Callable[[Any, Any, dict[str, Any]], float] = field(
        default=lambda out, expected, arrays: tolerance.error(out, expected)
    )
    candidates: Callable[[Spec], Sequence[Any]] = field(default=lambda spec: ())
    platforms: tuple[str, ...] = ("gpu", "tpu")

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.call.__name__

    def has_kernel(self, spec: Spec, platform: str) -> bool:
        """Says whether a platform has a kernel for a case."""
        return platform in self.platforms and platform in spec.platforms
