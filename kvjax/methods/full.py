"""Keeps every token: the dense cache that the others are compared with.

State: one slot per token. Bytes per token and layer: 2·K·D of the storage type.
"""

from dataclasses import dataclass

from kvjax.method import CacheMethod

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(CacheMethod):
    """Keeps every token."""
