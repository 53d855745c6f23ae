"""Runs a function with the cache's own checks on."""

from pallas_kernels.backend import checked as debug

__all__ = ["debug"]
