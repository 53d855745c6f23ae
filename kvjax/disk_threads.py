"""Threads that move chunks: some for what a program waits for, others for what it does not."""

from concurrent.futures import ThreadPoolExecutor

__all__ = ["Threads"]


class Threads:
    """Two pools, so that what is waited for does not queue behind what is read ahead or written behind."""

    def __init__(self, n: int) -> None:
        """Makes n of each; they start when there is work."""
        self.waited_for, self.behind = ThreadPoolExecutor(n), ThreadPoolExecutor(n)

    def shutdown(self) -> None:
        """Ends them once all is done."""
        self.behind.shutdown()
        self.waited_for.shutdown()
