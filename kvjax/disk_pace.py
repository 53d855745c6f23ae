"""Keeps count of what a disk has moved, and of how fast it is beside the device."""

from dataclasses import dataclass

__all__ = ["Pace", "Traffic"]


@dataclass
class Traffic:
    """What has moved since a store was opened. Chunks are counted once in each call that asks for them."""

    asked: int = 0  # chunks
    pooled: int = 0  # of them were in host memory
    expected: int = 0  # of the others, threads were reading already
    read_bytes: int = 0  # from disk as they are
    read4_bytes: int = 0  # from disk in 4 bits
    sent_bytes: int = 0  # to the device
    waited_s: float = 0.0  # a program waited for the disk
    busy_s: float = 0.0  # in calls, waiting included


class Pace:
    """What is known of the time: how fast the disk is, and how long the device computes between two reads."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.rate: float | None = None  # bytes per second
        self.compute_s: float | None = None
        self._left: float | None = None

    def entered(self, now: float) -> None:
        """Notes that a program asks."""
        if self._left is not None:
            self.compute_s = _mean(self.compute_s, now - self._left)

    def left(self, now: float) -> None:
        """Notes that it goes on."""
        self._left = now

    def read(self, n_bytes: int, seconds: float) -> None:
        """Notes what the disk did while a program waited."""
        if n_bytes and seconds > 0:
            self.rate = _mean(self.rate, n_bytes / seconds)

    def share(self, n_bytes: int, small_bytes: int) -> float:
        """Returns the least share to read in 4 bits so that reading takes no longer than computing.

        Example:
            >>> pace = Pace()
            >>> pace.rate, pace.compute_s = 1e9, 0.01
            >>> round(pace.share(n_bytes=20_000_000, small_bytes=5_000_000), 3)  # 20 ms to bring into 10
            0.667
        """
        if self.rate is None or self.compute_s is None:
            return 0.0
        late, saved = n_bytes / self.rate - self.compute_s, (n_bytes - small_bytes) / self.rate
        return min(max(late / saved, 0.0), 1.0) if saved > 0 else 0.0


def _mean(old: float | None, new: float) -> float:
    """Returns a running mean that forgets."""
    return new if old is None else 0.9 * old + 0.1 * new
